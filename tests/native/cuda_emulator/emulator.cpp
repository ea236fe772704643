// Fibers for the threads of a block: see cuda/device.h beside this.
//
// A fiber gives way only where its thread may have to wait: at a barrier of its block, or of its warp. The next one is
// drawn at random among those that can go on, by warps, since the lanes of a warp go together anyway.
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

bool can_go_on(const Fiber& fiber) { return !fiber.done && !fiber.waits_for_block && !fiber.waits_for_warp; }

void start_fiber(Fiber& fiber, const Place& place) {
  fiber.place = place;
  fiber.done = fiber.waits_for_block = fiber.waits_for_warp = false;
  fiber.groups.clear();
  fiber.open.clear();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

void run_block(int64_t block, int64_t blocks, int threads, int shared) {
  // Exactly of its size, so that the sanitizer sees what lies outside.
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, size_t(shared)) != 0) fail("no memory");
  machine.shared.reset(static_cast<uint8_t*>(memory));
  std::memset(machine.shared.get(), 0xff, size_t(shared));
  while (int(machine.fibers.size()) < threads) machine.fibers.push_back(std::make_unique<Fiber>());
  machine.warps.assign(size_t(threads / 32), Warp());
  for (int i = 0; i < threads; ++i) start_fiber(*machine.fibers[size_t(i)], {i, block, blocks});
  machine.live = threads;
  machine.at_barrier = 0;
  std::vector<int> order(size_t(threads / 32));
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  while (machine.live > 0) {
    bool moved = false;
    std::shuffle(order.begin(), order.end(), random_order);
    for (const int warp : order) {
      for (int lane = 0; lane < 32; ++lane) {
        Fiber& fiber = *machine.fibers[size_t(32 * warp + lane)];
        if (can_go_on(fiber)) resume(fiber), moved = true;
      }
    }
    if (!moved) fail("every thread waits: a barrier that not all of them reach");
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

void copy_async(void* to, const void* from, bool there) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0)
    fail("a copy that is not aligned");
  machine.current->open.push_back({to, from, there});
}

void commit_copies() {
  machine.current->groups.push_back(std::move(machine.current->open));
  machine.current->open.clear();
}

void wait_copies(int left) {
  auto& groups = machine.current->groups;
  while (int(groups.size()) > left) {
    for (const Copy& copy : groups.front()) {
      if (copy.there) std::memcpy(copy.to, copy.from, 16);
      if (!copy.there) std::memset(copy.to, 0, 16);
    }
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

float bf16_to_float(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

float fp16_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(float(fraction), -24)
                          : exponent == 31 ? (fraction ? NAN : INFINITY)
                                           : std::ldexp(float(fraction + 1024), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

uint16_t float_to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// To the nearest multiple of its last place, ties to even, by way of doubles.
uint16_t float_to_fp16(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7fff;
  const double magnitude = std::fabs(double(value));
  if (magnitude >= 65520) return uint16_t(sign | 0x7c00);
  const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
  const int places = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 1024 to 2048, less if subnormal
  return uint16_t(sign | ((exponent + 14) * 1024 + places));
}

}  // namespace emulator
