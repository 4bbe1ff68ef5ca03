// Plans without torch, for sanitizers: what tests/test_plan_sanitized.py has written runs in many threads at once with
// the expected bits, and whatever words of a plan, its weights and its inputs' shapes are changed, a plan is refused or
// runs within its memory.
//
//   plan_test threads <calls of each thread> <file>...     eight threads share each file's plan
//   plan_test fuzz <first case> <cases> <file>...          a case is a number: it chooses the file and what is changed
//
// A file is little-endian 64-bit words: isa, bytes of the plan, bytes of the weights, calls; then the plan and the
// weights; then of each call the inputs (their number; of each dtype, dimensions, sizes, strides, bytes and the bytes)
// and the outputs (their number; of each its bytes). Bytes are padded to whole words.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "cpu/arithmetic/kernels.h"
#include "cpu/attention/kernels.h"
#include "cpu/conv/kernels.h"
#include "cpu/conv/winograd.h"
#include "cpu/normalize/kernels.h"
#include "cpu/plan/builder.h"
#include "cpu/plan/cache.h"
#include "cpu/pool/kernels.h"
#include "cpu/quantize/kernels.h"
#include "cpu/upsample/kernels.h"

using namespace pykernels;

// Two isas are enough, and compile in time.
namespace pykernels {
namespace {
std::atomic<Isa> isa_in_force{Isa::scalar};
}
Isa current_isa() { return isa_in_force; }

#define PK_EITHER(Table, name) \
  const Table& name() { return current_isa() == Isa::avx2 ? avx2::name : scalar::name; }
PK_EITHER(ArithmeticKernels, arithmetic_kernels)
PK_EITHER(AttentionKernels, attention_kernels)
PK_EITHER(DepthwiseKernels, depthwise_kernels)
PK_EITHER(DepthwiseWordsKernels, depthwise_words_kernels)
PK_EITHER(DotKernels, dot_kernels)
PK_EITHER(EpilogueKernels, epilogue_kernels)
PK_EITHER(NormalizeKernels, normalize_kernels)
PK_EITHER(PoolKernels, pool_kernels)
PK_EITHER(QuantizeKernels, quantize_kernels)
PK_EITHER(UpsampleKernels, upsample_kernels)
PK_EITHER(WinogradKernels, winograd_kernels)
}  // namespace pykernels

namespace {

constexpr int64_t kMuch = int64_t{1} << 30;  // is refused by the allocator here
std::atomic<size_t> most_asked{0};           // in bytes

}  // namespace

// What a hostile number asks for must not be asked of the system: here that is an exception.
#define PK_ALLOCATOR __attribute__((noinline))
PK_ALLOCATOR void* operator new(size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  void* p = nullptr;
  if (bytes > most_asked) most_asked = bytes;
  return bytes < kMuch && posix_memalign(&p, static_cast<size_t>(alignment), bytes) == 0 ? p : nullptr;
}
PK_ALLOCATOR void* operator new(size_t bytes, std::align_val_t alignment) {
  if (void* p = operator new(bytes, alignment, std::nothrow)) return p;
  throw std::bad_alloc();
}
PK_ALLOCATOR void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  return operator new(bytes, std::align_val_t{16}, std::nothrow);
}
PK_ALLOCATOR void* operator new(size_t bytes) { return operator new(bytes, std::align_val_t{16}); }
PK_ALLOCATOR void operator delete(void* p) noexcept { std::free(p); }
PK_ALLOCATOR void operator delete(void* p, size_t) noexcept { std::free(p); }
PK_ALLOCATOR void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
PK_ALLOCATOR void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }

namespace {

using Bytes = std::vector<uint8_t>;

// Exactly so many bytes, `past` a multiple of 64 bytes, so that sanitizers see what is read behind them.
class Block {
 public:
  explicit Block(int64_t bytes, int64_t past = 0) : past_(past), bytes_(bytes) {
    if (posix_memalign(&memory_, 64, past + bytes) != 0) throw std::bad_alloc();
    std::memset(data(), 0, bytes);
  }
  explicit Block(const Bytes& from, int64_t past = 0) : Block(static_cast<int64_t>(from.size()), past) {
    if (!from.empty()) std::memcpy(data(), from.data(), from.size());
  }
  Block(Block&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), past_(other.past_), bytes_(other.bytes_) {}
  ~Block() { std::free(memory_); }
  uint8_t* data() const { return static_cast<uint8_t*>(memory_) + past_; }
  int64_t size() const { return bytes_; }

 private:
  void* memory_ = nullptr;
  int64_t past_, bytes_;
};

struct Input {
  View view;
  Bytes bytes;
};

struct Call {
  std::vector<Input> inputs;
  std::vector<Bytes> outputs;
};

struct File {
  std::string name;
  Isa isa;
  Bytes plan, weights;
  std::vector<Call> calls;
};

class Reader {
 public:
  explicit Reader(const char* name) {
    std::ifstream stream(name, std::ios::binary);
    all_.assign(std::istreambuf_iterator<char>(stream), {});
    if (all_.empty()) std::fprintf(stderr, "%s cannot be read\n", name), std::exit(2);
  }
  int64_t word() {
    int64_t value;
    std::memcpy(&value, all_.data() + at_, 8);
    at_ += 8;
    return value;
  }
  Bytes bytes(int64_t count) {
    const auto first = all_.begin() + at_;
    at_ += (count + 7) / 8 * 8;
    return {first, first + count};
  }

 private:
  std::vector<char> all_;
  int64_t at_ = 0;
};

File read(const char* name) {
  Reader r(name);
  File file;
  file.name = name;
  file.isa = static_cast<Isa>(r.word());
  const int64_t plan = r.word(), weights = r.word(), calls = r.word();
  file.plan = r.bytes(plan);
  file.weights = r.bytes(weights);
  for (int64_t i = 0; i < calls; ++i) {
    Call& call = file.calls.emplace_back();
    call.inputs.resize(r.word());
    for (Input& input : call.inputs) {
      input.view.dtype = static_cast<Dtype>(r.word());
      input.view.dims = r.word();
      for (int64_t d = 0; d < input.view.dims; ++d) input.view.sizes[d] = r.word();
      for (int64_t d = 0; d < input.view.dims; ++d) input.view.strides[d] = r.word();
      const int64_t bytes = r.word();
      input.bytes = r.bytes(bytes);
    }
    call.outputs.resize(r.word());
    for (Bytes& output : call.outputs) {
      const int64_t bytes = r.word();
      output = r.bytes(bytes);
    }
  }
  return file;
}

// As run_plan does (csrc/cpu/plan/op.cpp).
PlanLayout prepare(const Block& plan, const Block& weights, const std::vector<View>& inputs, int64_t threads,
                   int64_t by_image) {
  const Program program = read_program(plan.data(), plan.size());
  PK_CHECK(program.weight_bytes <= weights.size(), "the weights are too short");
  PK_CHECK(program.inputs.size() == inputs.size(), "another number of inputs");
  for (size_t i = 0; i < inputs.size(); ++i)
    PK_CHECK(program.inputs[i].dtype == inputs[i].dtype && program.inputs[i].dims == inputs[i].dims, "another input");
  return prepare(program, weights.data(), inputs, threads, by_image);
}

std::unique_ptr<Prepared> take_or_prepare(const Block& plan, const Block& weights, const std::vector<View>& inputs,
                                          int64_t threads, int64_t by_image) {
  const uint64_t hash = plan_hash(plan.data(), plan.size());
  const int isa = static_cast<int>(current_isa());
  PlanKey key{hash, plan.size(), weights.data(), weights.size(), threads, isa, true, by_image, {}};
  for (const View& v : inputs)
    for (int64_t d = 0; d < v.dims; ++d) key.inputs.push_back(v.sizes[d]), key.inputs.push_back(v.strides[d]);
  if (auto prepared = take(key)) return prepared;
  PlanLayout layout = prepare(plan, weights, inputs, threads, by_image);
  return std::make_unique<Prepared>(std::move(key), std::move(layout), weights.data());
}

std::vector<Block> memory_of_outputs(const PlanLayout& layout) {
  std::vector<Block> outputs;
  for (const View& v : layout.outputs) outputs.emplace_back(v.bytes());
  return outputs;
}

void bind(Prepared& prepared, const std::vector<Block>& inputs, const std::vector<Block>& outputs) {
  std::vector<const uint8_t*> from;
  std::vector<uint8_t*> to;
  for (const Block& b : inputs) from.push_back(b.data());
  for (const Block& b : outputs) to.push_back(b.data());
  prepared.bind(from.data(), to.data());
}

// --- threads ---

// One call: of the threads that it was made ready for, some come at once, some late and some never, but one at least.
bool right(const File& file, const Block& plan, const Block& weights, const Call& call,
           const std::vector<Block>& inputs, std::mt19937_64& random) {
  const auto below = [&](uint64_t n) { return static_cast<int64_t>(random() % n); };
  std::vector<View> views;
  for (const Input& input : call.inputs) views.push_back(input.view);
  const int64_t threads = 1 + below(4);
  const int64_t steps = below(3) ? 1 + below(60) : kGaining;  // by image
  std::unique_ptr<Prepared> prepared = take_or_prepare(plan, weights, views, threads, steps);
  const std::vector<Block> outputs = memory_of_outputs(prepared->layout());
  bind(*prepared, inputs, outputs);
  prepared->runner().begin();
  const int64_t one = below(threads);
  std::vector<std::thread> others;
  for (int64_t me = 0; me < threads; ++me) {
    const int64_t late = below(4);  // 3: never
    if (me == one || late == 3) continue;
    others.emplace_back([&prepared = *prepared, me, late] {
      if (late) usleep(late * late * 20);
      prepared.runner().take_part(me, prepared.scratch(me));
    });
  }
  if (below(4) == 0) usleep(50);
  prepared->runner().take_part(one, prepared->scratch(one));
  for (std::thread& other : others) other.join();
  bool same = outputs.size() == call.outputs.size();
  for (size_t i = 0; same && i < outputs.size(); ++i)
    same = outputs[i].size() == static_cast<int64_t>(call.outputs[i].size()) &&
           std::memcmp(outputs[i].data(), call.outputs[i].data(), outputs[i].size()) == 0;
  give(std::move(prepared));
  if (below(200) == 0) forget(weights.data());
  if (!same) std::printf("%s: a call yields other bits\n", file.name.c_str());
  return same;
}

int run_threads(int64_t calls, const std::vector<File>& files) {
  std::atomic<int64_t> done{0}, wrong{0};
  for (const File& file : files) {
    isa_in_force = file.isa;
    const Block plan(file.plan), weights(file.weights);
    std::vector<std::vector<Block>> inputs;
    for (const Call& call : file.calls) {
      inputs.emplace_back();
      for (const Input& input : call.inputs) inputs.back().emplace_back(input.bytes);
    }
    std::vector<std::thread> callers;
    for (uint64_t caller = 0; caller < 8; ++caller)
      callers.emplace_back([&, caller] {
        std::mt19937_64 random(caller);
        for (int64_t i = 0; i < calls; ++i, ++done) {
          const size_t which = random() % file.calls.size();
          if (!right(file, plan, weights, file.calls[which], inputs[which], random)) ++wrong;
        }
      });
    for (std::thread& caller : callers) caller.join();
    forget(weights.data());
  }
  std::printf("%lld calls, %lld differences\n", static_cast<long long>(done), static_cast<long long>(wrong));
  return wrong != 0;
}

// --- fuzz ---

// FNV-1a, of packed headers by bytes and of plans by words.
uint64_t hash_bytes(const uint8_t* bytes, int64_t count) {
  uint64_t hash = 1469598103934665603ull;
  for (int64_t i = 0; i < count; ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
  return hash;
}

class Case {
 public:
  Case(int64_t number, const std::vector<File>& files)
      : random_(number), file_(files[below(files.size())]), plan_(file_.plan), weights_(file_.weights) {
    const Call& call = file_.calls[below(file_.calls.size())];
    for (const Input& input : call.inputs) inputs_.push_back(input.view);
  }

  // What became of it; null: more memory was asked for than there is.
  const char* run() {
    isa_in_force = file_.isa;
    const int64_t kinds = below(8);
    if (kinds < 5 || kinds == 7) change_plan();
    if (kinds == 5 || kinds == 7) change_weights();
    if (kinds == 6 || below(4) == 0) change_inputs();
    repair_hash();
    try {
      return run_changed();
    } catch (const std::bad_alloc&) {
      return most_asked > static_cast<uint64_t>(memory_of_machine()) ? nullptr : "too large to be made ready";
    } catch (const std::runtime_error&) {
      return "refused";
    }
  }

 private:
  int64_t below(uint64_t n) { return static_cast<int64_t>(random_() % n); }

  int64_t word(int64_t i) const {
    int64_t value;
    std::memcpy(&value, plan_.data() + 8 * i, 8);
    return value;
  }
  void set_word(int64_t i, int64_t value) {
    if (i < words()) std::memcpy(plan_.data() + 8 * i, &value, 8);
  }
  int64_t words() const { return static_cast<int64_t>(plan_.size()) / 8; }

  // A number in place of `now`.
  int64_t number(int64_t now) {
    static constexpr double kReals[] = {0.0, -1.0, 1e-40, 1e-30, 0.5, 3.0, 1e30, 1e300, HUGE_VAL, NAN};
    const auto bits_of_now = static_cast<uint64_t>(now);
    switch (below(12)) {
      case 0:
      case 9: return below(10) - 2;
      case 1:
      case 10: return static_cast<int64_t>(bits_of_now + random_() % 5 - 2);
      case 2: return static_cast<int64_t>(bits_of_now * 2);
      case 3:
      case 11: return below(300);
      case 4: return (int64_t{1} << below(63)) + below(3) - 1;
      case 5: return -(int64_t{1} << below(63)) - below(2);
      case 6: return static_cast<int64_t>(random_() >> below(64));
      case 7: return word(below(words()));
      default: {
        int64_t bits;
        std::memcpy(&bits, &kReals[below(std::size(kReals))], 8);
        return bits;
      }
    }
  }

  void change_plan() {
    for (int64_t left = below(3) ? 1 : 2 + below(2); left > 0; --left) {
      const int64_t i = 4 + below(words() - 4);
      set_word(i, number(word(i)));
    }
    if (below(16) == 0) {  // shorter, or with words put in
      const int64_t i = 4 + below(words() - 4), count = 1 + below(3);
      if (below(2))
        plan_.resize(below(4) ? 8 * i : plan_.size() - 1);
      else
        plan_.insert(plan_.begin() + 8 * i, 8 * count, static_cast<uint8_t>(below(2)));
      if (below(8)) set_word(2, words());
    }
    if (below(8) == 0) set_word(5, static_cast<int64_t>(file_.isa) + 1), set_word(6, threads_);  // tilings count
  }

  void repair_hash() {
    if (words() < 7) return;
    uint64_t hash = 1469598103934665603ull;
    for (int64_t i = 4; i < words(); ++i) hash = (hash ^ static_cast<uint64_t>(word(i))) * 1099511628211ull;
    set_word(3, static_cast<int64_t>(hash));
  }

  // Of a header of packed weights that a plan names: other sizes, with a hash that fits or the whole header.
  void change_header(int64_t at) {
    PackedHeader h;
    std::memcpy(&h, weights_.data() + at, sizeof h);
    const int64_t bytes = h.bytes;
    if (below(2)) {
      int64_t* const sizes[] = {&h.groups, &h.n, &h.k, &h.kh, &h.kw};
      for (int64_t left = 1 + below(2); left > 0; --left) {
        int64_t& size = *sizes[below(5)];
        size = below(2) ? below(20) : size + below(3) - 1;
      }
      if (below(4) == 0) h.kind = static_cast<PackKind>(below(2));
      if (below(8) == 0) h.element = static_cast<Element>(below(4));
      h = make_header(h.kind, h.element, h.groups, h.n, h.k, h.kh, h.kw, below(2) != 0);
      for (int64_t i = 7; i + 1 < words(); ++i)
        if (word(i) == at && word(i + 1) == bytes) set_word(i + 1, h.bytes);
    } else {
      const int64_t i = below(sizeof h / 8);
      int64_t value;
      std::memcpy(&value, reinterpret_cast<uint8_t*>(&h) + 8 * i, 8);
      value = number(value);
      std::memcpy(reinterpret_cast<uint8_t*>(&h) + 8 * i, &value, 8);
      h.hash = hash_bytes(reinterpret_cast<uint8_t*>(&h), offsetof(PackedHeader, hash));
    }
    std::memcpy(weights_.data() + at, &h, sizeof h);
  }

  void change_weights() {
    std::vector<int64_t> headers;
    for (int64_t at = 0; at + static_cast<int64_t>(sizeof(PackedHeader)) <= static_cast<int64_t>(weights_.size());
         at += 64)
      if (std::memcmp(weights_.data() + at, "PKPACK01", 8) == 0) headers.push_back(at);
    if (!headers.empty() && below(4)) return change_header(headers[below(headers.size())]);
    if (below(8) == 0) {
      weights_.resize(below(weights_.size()));
      if (below(2)) set_word(4, static_cast<int64_t>(weights_.size()));
      return;
    }
    for (int64_t left = 1 + below(8); left > 0; --left)
      weights_[below(weights_.size())] = static_cast<uint8_t>(random_());
  }

  void change_inputs() {
    for (View& v : inputs_) {
      for (int64_t d = 0; d < v.dims; ++d)
        if (below(3) == 0) v.sizes[d] = below(12) == 0 ? int64_t{1} << below(44) : below(4) ? below(40) : below(4);
      double elements = 1;
      for (int64_t d = 0; d < v.dims; ++d) elements *= static_cast<double>(std::max<int64_t>(v.sizes[d], 1));
      if (elements < 1e15)
        set_strides(v, below(2));
      else
        v.strides = {};
      for (int64_t d = 0; d < v.dims; ++d) {
        const int64_t kind = below(12);
        if (kind == 0) v.strides[d] = 0;
        if (kind == 1) v.strides[d] = 1 + below(50);
        if (kind == 2) v.strides[d] *= 2;
        if (kind == 3 && v.sizes[d] <= 1) v.strides[d] = int64_t{1} << below(63);
      }
      if (below(16) == 0) v.dtype = static_cast<Dtype>(below(6));
    }
  }

  // Bytes that the input takes, or more than there can be.
  static int64_t extent(const View& v) {
    int64_t last = 0;
    for (int64_t d = 0; d < v.dims; ++d) {
      if (v.sizes[d] == 0) return 0;
      int64_t reach;
      if (v.sizes[d] > 1 &&
          (__builtin_mul_overflow(v.sizes[d] - 1, v.strides[d], &reach) || __builtin_add_overflow(last, reach, &last)))
        return INT64_MAX;
    }
    return last < (int64_t{1} << 50) ? (last + 1) * dtype_bytes(v.dtype) : INT64_MAX;
  }

  const char* run_changed() {
    const Block plan(plan_), weights(weights_, 8 * below(8));
    int64_t bytes = 0, operations = 0, scratch = 0;
    for (const View& v : inputs_) bytes = std::max(bytes, extent(v));
    if (bytes > (int64_t{1} << 47)) return "inputs that cannot be";
    PlanLayout layout = prepare(plan, weights, inputs_, threads_, by_image_);
    const auto add = [](int64_t more, int64_t* to) { *to += std::min(more, kMuch); };
    add(layout.arena_bytes, &bytes);
    for (const Work& work : layout.work) add(work.bytes, &bytes), add(work.operations, &operations);
    for (const View& v : layout.outputs) add(v.bytes(), &bytes);
    for (const auto& driver : layout.drivers) scratch = std::max(scratch, driver->scratch);
    if (bytes > (16 << 20) || operations > (64 << 20) || scratch > (16 << 20)) return "ready, too large to run";

    Prepared prepared({0, 0, weights.data(), 0, threads_, 0, true, by_image_, {}}, std::move(layout), weights.data());
    std::vector<Block> inputs;
    for (const View& v : inputs_) {
      inputs.emplace_back(extent(v));
      for (int64_t i = 0; i < inputs.back().size(); ++i) inputs.back().data()[i] = static_cast<uint8_t>(i * 37);
    }
    const std::vector<Block> outputs = memory_of_outputs(prepared.layout());
    bind(prepared, inputs, outputs);
    prepared.runner().begin();
    prepared.runner().take_part(below(threads_), prepared.scratch(0));
    return "runs";
  }

  std::mt19937_64 random_;
  const File& file_;
  Bytes plan_, weights_;
  std::vector<View> inputs_;
  int64_t threads_ = 1 + below(4);
  int64_t by_image_ = below(3) ? 1 + below(60) : kGaining;
};

int64_t number_in_hand = 0;

void tell_and_exit(int signal) {
  std::printf("case %lld: %s\n", static_cast<long long>(number_in_hand),
              signal == SIGALRM ? "takes too long" : "crash");
  std::fflush(stdout);
  std::_Exit(1);
}

int run_fuzz(int64_t first, int64_t count, const std::vector<File>& files) {
  std::map<std::string, int64_t> outcomes;
  bool good = true;
  std::signal(SIGALRM, tell_and_exit);
  std::signal(SIGABRT, tell_and_exit);
  for (number_in_hand = first; number_in_hand < first + count; ++number_in_hand) {
    alarm(20);
    const char* outcome = Case(number_in_hand, files).run();
    if (outcome)
      ++outcomes[outcome];
    else
      good = false, std::printf("case %lld: too much memory\n", static_cast<long long>(number_in_hand));
  }
  std::printf("%lld cases", static_cast<long long>(count));
  for (const auto& [outcome, times] : outcomes)
    std::printf(", %lld %s", static_cast<long long>(times), outcome.c_str());
  std::printf("\n");
  return !good;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  const int names = what == "threads" ? 3 : 4;
  if ((what != "threads" && what != "fuzz") || count <= names) return std::fprintf(stderr, "see plan_test.cpp\n"), 2;
  std::vector<File> files;
  for (int i = names; i < count; ++i) {
    File file = read(arguments[i]);
    if (isa_available(file.isa)) files.push_back(std::move(file));
  }
  const int64_t number = std::atoll(arguments[2]);
  return what == "threads" ? run_threads(number, files) : run_fuzz(number, std::atoll(arguments[3]), files);
}
