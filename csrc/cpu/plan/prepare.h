// A plan made ready: for the shapes and strides of its inputs, a number of threads and the isa in force. All that does
// not change from call to call is done here: checks, shapes, scales folded, kernels, tiles and splits chosen, memory
// placed. Torch-free.
#pragma once

#include <array>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "common/strides.h"
#include "cpu/plan/format.h"
#include "cpu/plan/run.h"

namespace pykernels {

class ByImageDriver;

using Sizes = std::array<int64_t, kMaxDims>;

// A tensor in one of the plan's buffers; strides in elements.
struct View {
  Dtype dtype;
  int64_t dims = 0;
  Sizes sizes{}, strides{};
  int buffer = -1;
  int64_t offset = 0;  // bytes from the buffer's first

  int64_t numel() const;
  int64_t bytes() const { return numel() * dtype_bytes(dtype); }
};

// Whether there are so few elements that no size, stride or number of bytes of a tensor overflows, be some sizes 0 or
// not.
bool is_countable(const View& v);
// As torch has them.
bool is_contiguous(const View& v);
bool is_channels_last(const View& v);
// Elements fill their memory without holes or overlaps, in whatever order of the dimensions.
bool is_dense(const View& v);
// What torch makes of `v` where it keeps a memory format: the order of its strides, with holes or without.
bool suggests_channels_last(const View& v);
void set_strides(View& v, bool channels_last);
// Dense, in the order in which torch's elementwise functions lay out the result of these operands, of v's sizes.
void set_strides_like(View& v, std::initializer_list<const View*> operands);

struct Buffer {
  enum class Kind { arena, input, output, weights } kind;
  int64_t bytes;
  int64_t place;                         // in the arena or the weights; the number of an input or output
  int64_t first = INT64_MAX, last = -1;  // drivers that use it
};

// What a driver does, for a table.
struct Work {
  int step;
  const char* kernel;
  Dtype dtype;           // of what it reads
  int64_t bytes;         // read and written, weights included
  int64_t weight_bytes;  // of these
  int64_t operations;    // multiplications and additions of a product; else 0
  int64_t tasks;
  bool by_image;  // it is one of those that a ByImageDriver runs: the sum of all images
};

struct PlanLayout {
  struct Place {
    int buffer = -1;
    int64_t offset = 0;
  };
  struct Binding {
    std::vector<Place> in;
    Place out;
  };

  std::vector<std::unique_ptr<Driver>> drivers;
  std::vector<Binding> bindings;      // of each driver
  std::vector<Work> work;             // of each driver; of the first one's, where that goes image by image
  ByImageDriver* by_image = nullptr;  // the first driver, where it is one
  std::vector<Buffer> buffers;
  std::vector<View> values;         // of inputs and steps
  std::vector<View> outputs;        // dense
  std::vector<bool> channels_last;  // of the outputs
  int64_t arena_bytes = 0, least_arena_bytes = 0;
};

std::vector<const Driver*> drivers_of(const PlanLayout& layout);

// `inputs` are as the caller has them, their buffers still unset; `weights` stay where they are. Throws where shapes or
// numbers do not fit one another, or more memory would be needed than there is. `by_image`: which of the first steps
// run image by image, see head.h.
PlanLayout prepare(const Program& program, const uint8_t* weights, const std::vector<View>& inputs, int64_t threads,
                   int64_t by_image);

}  // namespace pykernels
