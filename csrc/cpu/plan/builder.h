// Makes the drivers of a plan, step by step; what each kind of step reads of its numbers and reals stands in the
// comment before its function in layers.cpp, pointwise.cpp, moves.cpp and images.cpp.
#pragma once

#include <map>

#include "cpu/arithmetic/driver.h"
#include "cpu/conv/driver.h"
#include "cpu/plan/head.h"

namespace pykernels {

int64_t memory_of_machine();  // in bytes

inline Real real_of(Dtype t) { return t == Dtype::f32 ? Real::fp32 : t == Dtype::f16 ? Real::fp16 : Real::bf16; }

// Values that are written where a concatenation of them will stand, by a first look at the shapes.
struct Joined {
  struct Piece {
    int cat = -1;         // the value that joins it with others; -1: it has memory of its own
    int64_t channel = 0;  // where it begins in it
  };
  std::vector<Piece> pieces;  // of each value
  std::vector<View> wholes;   // of each value that joins others
  bool any = false;

  // Of the steps from `first` on.
  Joined(const Program& program, const PlanLayout& layout, int64_t first);
};

class Builder {
 public:
  Builder(const Program& program, const uint8_t* weights, const std::vector<View>& inputs, int64_t threads,
          const Joined* joined = nullptr);

  PlanLayout layout;

  // The first steps, image by image; `whole` has the values of all. Then come the other steps.
  void by_image(const Head& head, const PlanLayout& whole);
  void build(const PlanStep& step);
  void finish();  // the outputs

 private:
  void begin(const PlanStep& step);
  void end();

  // Steps, by kind.
  void constant();
  void conv2d();
  void linear();
  void pool();
  void quantize();
  void dequantize();
  void cast();
  void quantized_binary();
  void quantized_cat();
  void lookup();
  void binary();
  void activated();
  void leaky_relu();
  void softmax();
  void layer_norm();
  void attention();
  void cat();
  void reshape();
  void permute();
  void slice();
  void expand();
  void pad();
  void contiguous();
  void upsample();
  void interleave();

  // Of the step in hand: its name for messages, operands, numbers and reals, each read once and in order.
  const char* name() const { return kStepNames[static_cast<int>(step_->kind)]; }
  const View& in(size_t i) const;
  size_t operands() const { return step_->in.size(); }
  int64_t number();
  int64_t number(int64_t low, int64_t high);  // in [low, high]
  double real();
  Dtype dtype();
  Ints pair();
  Activation activation();
  int64_t zero_point(Dtype t);
  double scale();
  void yields(const View& value) { value_ = value; }

  View shaped(Dtype dtype, const int64_t* sizes, int64_t dims, bool channels_last) const;  // without memory
  View fresh(Dtype dtype, const int64_t* sizes, int64_t dims, bool channels_last);
  View fresh_like(const View& v, Dtype dtype);  // of v's dense strides
  // What the step in hand yields, [n, c, h, w] in channels_last: memory of its own, or a part of a concatenation.
  View fresh_pixels(Dtype dtype, const int64_t* sizes);
  // The memory of a concatenation, the same for all who write into it.
  View whole(int value, const View& like);
  int value() const { return static_cast<int>(layout.values.size()); }  // what the step in hand yields
  bool joins() const { return joined_ && joined_->wholes[value()].dims > 0; }
  bool in_place(size_t i) const { return joined_ && joined_->pieces[step_->in[i]].cat == value(); }
  // Like `v`, operand i or a dense copy of it, and in its place where nobody reads it after this step.
  View in_place_of(const View& v, size_t i, Dtype dtype);
  bool dies(size_t i) const;  // whether nobody reads operand i, or another view of its memory, after this step
  bool shares(size_t i, size_t k) const { return roots_[step_->in[i]] == roots_[step_->in[k]]; }
  PackedView packed(Element element);
  Tiling tiling();
  Epilogue epilogue(const PackedView& weights, const View& x, Dtype* out_dtype);
  void add(std::unique_ptr<Driver> driver, const char* kernel, const std::vector<const View*>& operands,
           const View& out, int64_t operations = 0, int64_t weight_bytes = 0);
  void copy(const View& from, const View& to);
  View to_contiguous(const View& v);
  View to_channels_last(const View& v);
  View dense(const View& v, const View* beside = nullptr);  // beside: another operand, of v's shape
  View in_layout_of(const View& a, const View& b);

  View expanded(const View& v, const View& to);
  void check_real(Dtype t) const;
  void check_byte(Dtype t) const;

  struct Pairing {
    View a, b;
    Broadcast broadcast;
    bool overlap;  // b is part of a, and read for several of its elements
  };
  Pairing pairing(const View& a, const View& other);

  const Program& program_;
  const uint8_t* weights_;
  int64_t threads_;
  const PlanStep* step_ = nullptr;
  size_t numbers_read_ = 0, reals_read_ = 0;
  View value_;
  int weights_buffer_ = -1;
  const Joined* joined_;
  std::map<int, int> whole_buffers_;  // of concatenations, by their values
  std::vector<int> roots_;            // of each value the first of those that may be views of one memory
  std::vector<size_t> last_use_;      // of the values of a root: the last step that reads one, or the number of steps
};

}  // namespace pykernels
