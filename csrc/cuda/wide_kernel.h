// y = x W^T + b for 33 rows of x and more, on sm_90a's tensor cores: m64nTk16 with the weight as the 64 rows, from
// registers, and T rows of x ("tokens") in shared memory as the columns.
//
// As in linear_kernel.h a byte of codes becomes a pair of levels by one look-up, levels go into the tensor cores as
// they are, and a block's scale multiplies the fp32 sums of its columns afterwards: a weight is rounded once. What a
// warpgroup multiplies it has decoded one unit of 64 columns before, into the other of two buffers; a unit's sums are
// waited for, scaled and added while the other warpgroups multiply. One warpgroup more does nothing but load.
//
// Of a row of codes, word i has 8 columns, of which lane t of four wants byte t: four lanes load the same 16 bytes, and
// x may lie in its own order, so that 16-byte copies bring it. (In the order of linear_kernel.h, where a lane decodes
// what it loads, each 4 bytes of x would have to be moved by themselves.)
//
// Counted from compiled code, not measured on a device: clocks of a multiprocessor for 64 x 64 weights against T tokens
// (nvcc 13.0 for sm_90a, 2026-11-21). A tile has R rows: T = 64, R = 192, or T = 128, R = 128.
//
//   T                                                                        64    128
//   tensor cores, 2 T                                                       128    256
//   shared memory: x read by products T, x in 64 T / R, look-ups 64,
//     codes in 16, out 32 (lanes that want the same share requests)         197    304
//   four schedulers: 12 and 8 warps of 236 and 325 a step, 4 of 302 and 289 168    235
//   4.8 TB/s of codes and scales                                            102    102
//
// So shared memory is the bound, and leaves the tensor cores 65 % and 84 %. Scaled weights instead of scaled sums would
// take a look-up of 8 bytes, 64 clocks more of shared memory.
#pragma once

#include "cuda/wide_consumer.h"
#include "cuda/wide_producer.h"

namespace peftrt::cuda {

// Where there are no warpgroups the kernel takes 32 threads and has no body: the launcher asks for that.
template <int kTokens>
constexpr int kWideBound = kHasWarpgroups ? wide_layout(kTokens).threads : 32;

template <class T, int kTokens, int kUnit>
PEFTRT_KERNEL void PEFTRT_BOUNDS(kWideBound<kTokens>, 1) wide_kernel(Product product) {
  if constexpr (kHasWarpgroups) {
    using Block = WideBlock<kTokens, kUnit>;
    constexpr WideLayout kLayout = Block::kLayout;
    constexpr int kConsumers = kLayout.threads - kProducers;
    const Block block(product);
    const int thread = thread_index();
    if (thread >= kConsumers) {
      sync_block();
      give_registers<kLayout.producer_registers>();
      WideProducer<Block>(block, thread - kConsumers).run();
    } else {
      if (thread < 2 * kLayout.stages)
        start_barrier(block.full(thread), thread < kLayout.stages ? kProducers / 32 : kLayout.warps);
      sync_block();
      fill_pairs<T, kConsumers>(block.table, kPairStride, thread);
      if (thread < 256) block.dynamic()[thread] = kDeviceDynamic.value[thread];
      sync_block();
      take_registers<kLayout.consumer_registers>();
      WideConsumer<T, Block>(block, thread).run();
    }
  }
}

}  // namespace peftrt::cuda
