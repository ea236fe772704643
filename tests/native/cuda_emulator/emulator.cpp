// Fibers for the threads of a block: see cuda/device.h beside this.
//
// A fiber gives way only where its thread may have to wait: at a barrier of its block, of its warp, or in shared
// memory. The next one is drawn at random among those that can go on, by warps, since the lanes of a warp go together
// anyway.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cuda/device.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

namespace emulator {

int multiprocessors = 3;
std::mt19937_64 random_order;

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kSharedLimit = 227 * 1024;

struct Copy {
  void* to;
  const void* from;
  bool there;
  bool at_once;
};

// A product that is not done; what its sums were, where it adds to them and no other product does before it.
struct Pending {
  Product product;
  std::vector<float> start;
};

}  // namespace

struct Fiber {
  ucontext_t context;
  std::unique_ptr<uint8_t[]> stack = std::make_unique<uint8_t[]>(kStack);
  void* fake_stack = nullptr;
  Place place = {};
  bool done = false;
  bool waits_for_block = false, waits_for_warp = false;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
  const uint64_t* barrier = nullptr;  // whose phase of this parity it waits for
  uint32_t parity = 0;
  std::vector<uint8_t*> unshown;  // 16 bytes each, copied since products were last shown any
  std::vector<std::vector<Pending>> products;
  std::vector<Pending> open_products;
  bool started = false;  // products since the last commit
};

namespace {

struct Warp {
  Words words[2][32];  // in turn: a lane may write the next while another still reads the last
  int turn = 0, arrived = 0;
};

// What runs now.
struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<uint8_t, decltype(&std::free)> shared = {nullptr, &std::free};
  std::vector<uint8_t> shown;  // of shared memory, to products
  Fiber* current = nullptr;
  int live = 0, at_barrier = 0;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  const std::function<void()>* kernel = nullptr;
};
Machine machine;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

void give_way() {
  Fiber* fiber = machine.current;
  __sanitizer_start_switch_fiber(fiber->done ? nullptr : &fiber->fake_stack, machine.scheduler_stack,
                                 machine.scheduler_size);
  swapcontext(&fiber->context, &machine.scheduler);
  __sanitizer_finish_switch_fiber(fiber->fake_stack, &machine.scheduler_stack, &machine.scheduler_size);
}

void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_size);
  (*machine.kernel)();
  const Fiber& fiber = *machine.current;
  if (!fiber.products.empty() || !fiber.open_products.empty()) fail("a product that nobody waited for");
  machine.current->done = true;
  --machine.live;
  give_way();
}

void resume(Fiber& fiber) {
  machine.current = &fiber;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStack);
  swapcontext(&machine.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

BarrierState state_of(const uint64_t* barrier) {
  BarrierState state;
  std::memcpy(&state, barrier, sizeof state);
  if (state.count == 0xffff) fail("a barrier that nobody has started");
  return state;
}

bool over(const uint64_t* barrier, uint32_t parity) { return (state_of(barrier).phase & 1) != parity; }

bool can_go_on(const Fiber& fiber) {
  if (fiber.done || fiber.waits_for_block || fiber.waits_for_warp) return false;
  return fiber.barrier == nullptr || over(fiber.barrier, fiber.parity);
}

void start_fiber(Fiber& fiber, const Place& place) {
  fiber.place = place;
  fiber.done = fiber.waits_for_block = fiber.waits_for_warp = false;
  fiber.groups.clear();
  fiber.open.clear();
  fiber.barrier = nullptr;
  fiber.unshown.clear();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

void run_block(int64_t block, int64_t blocks, int threads, int shared) {
  if (shared != int(machine.shown.size()) || machine.shared == nullptr) {
    // Exactly of its size, so that the sanitizer sees what lies outside.
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, size_t(shared)) != 0) fail("no memory");
    machine.shared.reset(static_cast<uint8_t*>(memory));
  }
  std::memset(machine.shared.get(), 0xff, size_t(shared));
  machine.shown.assign(size_t(shared), 0xff);
  while (int(machine.fibers.size()) < threads) machine.fibers.push_back(std::make_unique<Fiber>());
  machine.warps.assign(size_t(threads / 32), Warp());
  for (int i = 0; i < threads; ++i) start_fiber(*machine.fibers[size_t(i)], {i, block, blocks});
  machine.live = threads;
  machine.at_barrier = 0;
  std::vector<int> order(size_t(threads / 32));
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  // Some warps are slow: most of their turns pass, so that others come to what they are to wait for long before.
  std::vector<uint64_t> turns_passed(order.size());
  for (uint64_t& passed : turns_passed) passed = random_order() % 4 == 0 ? 15 : random_order() % 8;
  while (machine.live > 0) {
    bool moved = false, passed = false;
    std::shuffle(order.begin(), order.end(), random_order);
    for (const int warp : order) {
      if (random_order() % 16 < turns_passed[size_t(warp)]) {
        passed = true;
        continue;
      }
      for (int lane = 0; lane < 32; ++lane) {
        Fiber& fiber = *machine.fibers[size_t(32 * warp + lane)];
        if (can_go_on(fiber)) resume(fiber), moved = true;
      }
    }
    if (!moved && !passed) fail("every thread waits: a barrier that not all of them reach");
  }
}

}  // namespace

const Place& place() { return machine.current->place; }
uint8_t* shared_memory() { return machine.shared.get(); }

void sync_block() {
  machine.current->waits_for_block = true;
  if (++machine.at_barrier == machine.live) {
    machine.at_barrier = 0;
    for (auto& fiber : machine.fibers) fiber->waits_for_block = false;
  }
  give_way();
}

const Words* exchange(const Words& mine) {
  const int thread = machine.current->place.thread;
  Warp& warp = machine.warps[size_t(thread / 32)];
  const Words* all = warp.words[warp.turn];
  warp.words[warp.turn][thread % 32] = mine;
  machine.current->waits_for_warp = true;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    warp.turn ^= 1;
    for (int lane = 0; lane < 32; ++lane) machine.fibers[size_t(thread / 32 * 32 + lane)]->waits_for_warp = false;
  } else {
    give_way();
  }
  return all;
}

namespace {

// Until the thread that has copied shows it, products may see it or not.
void perform(const Copy& copy) {
  if (copy.there) std::memcpy(copy.to, copy.from, 16);
  if (!copy.there) std::memset(copy.to, 0, 16);
  uint8_t* to = static_cast<uint8_t*>(copy.to);
  std::memset(&machine.shown[size_t(to - machine.shared.get())], 0xff, 16);
}

}  // namespace

void copy_async(void* to, const void* from, bool there) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0)
    fail("a copy that is not aligned");
  const Copy copy = {to, from, there, random_order() % 2 == 0};
  if (copy.at_once) perform(copy);
  machine.current->open.push_back(copy);
}

void commit_copies() {
  machine.current->groups.push_back(std::move(machine.current->open));
  machine.current->open.clear();
}

void wait_copies(int left) {
  auto& groups = machine.current->groups;
  while (int(groups.size()) > left) {
    for (const Copy& copy : groups.front()) {
      if (!copy.at_once) perform(copy);
      machine.current->unshown.push_back(static_cast<uint8_t*>(copy.to));
    }
    groups.erase(groups.begin());
  }
}

void start_barrier(uint64_t* barrier, int count) {
  const BarrierState state = {uint16_t(count), uint16_t(count), 0};
  std::memcpy(barrier, &state, sizeof state);
}

void arrive(uint64_t* barrier) {
  BarrierState state = state_of(barrier);
  if (--state.pending == 0) state.pending = state.count, ++state.phase;
  std::memcpy(barrier, &state, sizeof state);
}

void wait(uint64_t* barrier, uint32_t parity) {
  Fiber* fiber = machine.current;
  fiber->barrier = barrier;
  fiber->parity = parity;
  if (!over(barrier, parity)) give_way();
  fiber->barrier = nullptr;
}

void show_products() {
  for (const uint8_t* bytes : machine.current->unshown)
    std::memcpy(&machine.shown[size_t(bytes - machine.shared.get())], bytes, 16);
  machine.current->unshown.clear();
}

void start_products() { machine.current->started = true; }

void multiply_rows(const Product& product) {
  Fiber& fiber = *machine.current;
  if (!fiber.started) fail("a product that is not fenced from the registers it reads");
  bool chained = false;
  for (const Pending& other : fiber.open_products) chained |= other.product.sum == product.sum;
  for (const auto& group : fiber.products) {
    for (const Pending& other : group) {
      if (other.product.sum == product.sum) fail("two groups of products in flight for the same sums");
    }
  }
  Pending pending = {product, {}};
  if (product.add && !chained) pending.start.assign(product.sum, product.sum + product.sums);
  std::fill(product.sum, product.sum + product.sums, NAN);
  fiber.open_products.push_back(std::move(pending));
}

void commit_products() {
  machine.current->products.push_back(std::move(machine.current->open_products));
  machine.current->open_products.clear();
  machine.current->started = false;
}

namespace {

// Element k of row r of the rows that a descriptor names, by the fields of it.
uint16_t shown_element(uint64_t rows, int r, int k) {
  if (rows >> 62 != 1) fail("rows that are not swizzled by 128 bytes");
  const uint64_t start = (rows & 0x3fff) * 16, eight_rows = (rows >> 32 & 0x3fff) * 16;
  const uint64_t plain = start + uint64_t(r / 8) * eight_rows + uint64_t(r % 8 * 128 + 2 * k);
  const uint64_t address = plain ^ (plain >> 7 & 7) << 4;
  if (address + 2 > machine.shown.size()) fail("a product of what is outside of shared memory");
  uint16_t bits;
  std::memcpy(&bits, &machine.shown[address], 2);
  return bits;
}

// The sum of exact products in double, rounded once: within what the hardware's order and truncation may differ by.
void perform(const Pending& pending) {
  const Product& product = pending.product;
  Words mine = {};
  for (int i = 0; i < 4; ++i) mine.word[i] = product.a[i];
  const Words* all = exchange(mine);
  const int lane = machine.current->place.thread % 32;
  double a[2][16];
  for (int below = 0; below < 2; ++below) {
    for (int k = 0; k < 16; ++k) {
      const uint64_t pair = all[lane / 4 * 4 + k % 8 / 2].word[k / 8 * 2 + below];
      a[below][k] = double(product.value(uint16_t(pair >> 16 * (k % 2))));
    }
  }
  for (int pair = 0; pair < product.sums / 2; ++pair) {
    const int column = pair / 2 * 8 + lane % 4 * 2 + pair % 2, first = pair / 2 * 4 + pair % 2;
    double b[16];
    for (int k = 0; k < 16; ++k) b[k] = double(product.value(shown_element(product.rows, column, k)));
    for (int below = 0; below < 2; ++below) {
      float& sum = product.sum[first + 2 * below];
      double value = !product.add ? 0 : double(pending.start.empty() ? sum : pending.start[size_t(first + 2 * below)]);
      for (int k = 0; k < 16; ++k) value += a[below][k] * b[k];
      sum = float(value);
    }
  }
}

}  // namespace

void wait_products(int left) {
  auto& groups = machine.current->products;
  while (int(groups.size()) > left) {
    for (const Pending& pending : groups.front()) perform(pending);
    groups.erase(groups.begin());
  }
}

const char* launch(int64_t blocks, int threads, int shared, const std::function<void()>& kernel) {
  if (blocks < 1 || blocks >= int64_t(1) << 31) return "a grid of no blocks, or of too many";
  if (threads < 32 || threads > 1024 || threads % 32 != 0) return "a block of no whole warps, or of too many";
  if (shared > kSharedLimit) return "more shared memory than there is";
  machine.kernel = &kernel;
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  for (int64_t i = 0; i < blocks; ++i) order[size_t(i)] = i;
  std::shuffle(order.begin(), order.end(), random_order);
  for (const int64_t block : order) run_block(block, blocks, threads, shared);
  return nullptr;
}

}  // namespace emulator
