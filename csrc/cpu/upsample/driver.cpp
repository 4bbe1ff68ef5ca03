#include "cpu/upsample/driver.h"

#include <cmath>
#include <cstring>

namespace pykernels {
namespace {

// As ATen computes them, in fp32: of the place `out` the place in the input, nearest or between two.
Tap nearest_tap(int64_t i, int64_t in, int64_t out, double factor) {
  if (in == out) return {i, i, 1.0f, 0.0f};
  if (out == 2 * in) return {i / 2, i / 2, 1.0f, 0.0f};
  const float scale = factor > 0 ? static_cast<float>(1.0 / factor) : static_cast<float>(in) / static_cast<float>(out);
  const auto place = static_cast<int64_t>(std::floor(static_cast<float>(i) * scale));
  const int64_t at = std::min(std::max<int64_t>(place, 0), in - 1);
  return {at, at, 1.0f, 0.0f};
}

Tap linear_tap(int64_t i, int64_t in, int64_t out, double factor, bool align_corners) {
  if (in == out) return {i, i, 1.0f, 0.0f};
  float place;
  if (align_corners) {
    const float scale = out > 1 ? static_cast<float>(in - 1) / static_cast<float>(out - 1) : 0.0f;
    place = scale * static_cast<float>(i);
  } else {
    const float scale =
        factor > 0 ? static_cast<float>(1.0 / factor) : static_cast<float>(in) / static_cast<float>(out);
    place = std::max(0.0f, scale * (static_cast<float>(i) + 0.5f) - 0.5f);
  }
  const int64_t first = std::min(static_cast<int64_t>(place), in - 1);
  const float weight = std::min(std::max(place - static_cast<float>(first), 0.0f), 1.0f);
  return {first, first + (first < in - 1 ? 1 : 0), 1.0f - weight, weight};
}

std::vector<Tap> taps(const UpsampleProblem& p, int64_t in, int64_t out, double factor) {
  std::vector<Tap> found;
  for (int64_t i = 0; i < out; ++i)
    found.push_back(p.mode == Interpolation::nearest ? nearest_tap(i, in, out, factor)
                                                     : linear_tap(i, in, out, factor, p.align_corners));
  return found;
}

template <class T>
void gather(const uint8_t* from, const std::vector<Tap>& columns, uint8_t* to, int64_t step) {
  const T* x = reinterpret_cast<const T*>(from);
  T* y = reinterpret_cast<T*>(to);
  for (const Tap& tap : columns) {
    *y = x[tap.first];
    y += step;
  }
}

}  // namespace

std::array<int64_t, 2> upsample_output(const char* op, const int64_t* image, const Ints& sizes,
                                       const std::vector<double>& factors) {
  PK_CHECK(sizes.empty() != factors.empty(), op, ": either output_size or scale_factors must be given, and not both");
  PK_CHECK(sizes.empty() || sizes.size() == 2, op, ": output_size must have 2 numbers, not ", sizes.size());
  PK_CHECK(factors.empty() || factors.size() == 2, op, ": scale_factors must have 2 numbers, not ", factors.size());
  std::array<int64_t, 2> found;
  for (int64_t d = 0; d < 2; ++d) {
    PK_CHECK(image[d] > 0 && image[d] <= (int64_t{1} << 24), op,
             ": the height and width of x must lie in [1, 2^24], not ", image[d]);
    const double size = sizes.empty() ? static_cast<double>(image[d]) * factors[d] : static_cast<double>(sizes[d]);
    PK_CHECK(size >= 1 && size < 16777217.0, op, ": the height and width of the result must lie in [1, 2^24], not ",
             size);
    found[d] = static_cast<int64_t>(size);
  }
  return found;
}

// Units: rows of the output.
UpsampleDriver::UpsampleDriver(const UpsampleProblem& p, int64_t threads)
    : p_(p),
      rows_(taps(p, p.height, p.out_height, p.factors[0])),
      columns_(taps(p, p.width, p.out_width, p.factors[1])) {
  const int64_t row = p.out_width * p.channels;
  if (row > 0)
    set(cut(p.n * p.out_height, static_cast<double>(p.n) * p.out_height * row, threads,
            units_of_lines(p.out_width * p.out_step * pixel_bytes(p.type))));
}

void UpsampleDriver::nearest_row(const uint8_t* from, uint8_t* to) const {
  const int64_t bytes = pixel_bytes(p_.type), pixel = p_.channels * bytes, step = p_.out_step * bytes;
  if (p_.channels == 1) {
    if (bytes == 1) return gather<uint8_t>(from, columns_, to, p_.out_step);
    if (bytes == 2) return gather<uint16_t>(from, columns_, to, p_.out_step);
    return gather<uint32_t>(from, columns_, to, p_.out_step);
  }
  for (const Tap& tap : columns_) {
    std::memcpy(to, from + tap.first * pixel, pixel);
    to += step;
  }
}

void UpsampleDriver::piece(int64_t begin, int64_t end, uint8_t*) const {
  const int64_t bytes = pixel_bytes(p_.type), row = p_.width * p_.channels * bytes;
  const int64_t out_row = p_.out_width * p_.out_step * bytes;
  const bool dense = p_.out_step == p_.channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t y = unit % p_.out_height;
    const Tap& tap = rows_[y];
    const uint8_t* image = in_ + unit / p_.out_height * p_.height * row;
    uint8_t* to = out_ + unit * out_row;
    if (p_.mode == Interpolation::bilinear)
      kernels_.bilinear(image + tap.first * row, image + tap.second * row, p_.type, tap, columns_.data(), p_.out_width,
                        p_.channels, to, p_.out_step);
    else if (dense && unit > begin && y > 0 && rows_[y - 1].first == tap.first)
      std::memcpy(to, to - out_row, out_row);
    else
      nearest_row(image + tap.first * row, to);
  }
}

std::array<int64_t, 4> InterleaveShape::output(const char* op, const int64_t* sizes) const {
  check_pair(op, "stride", stride, 1);
  PK_CHECK(crop.size() == 4, op, ": crop must have 4 numbers, not ", crop.size());
  for (const int64_t side : crop)
    PK_CHECK(side >= 0 && side < (int64_t{1} << 31), op, ": crop must lie in [0, 2^31), not ", side);
  PK_CHECK(stride[0] <= 64 && stride[1] <= 64, op, ": stride must be at most 64");
  const int64_t phases = stride[0] * stride[1];
  PK_CHECK(groups >= 1 && sizes[1] > 0 && sizes[1] % phases == 0 && sizes[1] / phases % groups == 0, op,
           ": x must have channels for ", phases, " phases of ", groups, " groups, not ", sizes[1]);
  std::array<int64_t, 4> out{sizes[0], sizes[1] / phases};
  for (int64_t d = 0; d < 2; ++d) {
    const int64_t cut = crop[2 - 2 * d] + crop[3 - 2 * d];
    PK_CHECK(sizes[2 + d] < (int64_t{1} << 31) && sizes[2 + d] * stride[d] >= cut, op, ": crop takes ", cut, " of ",
             sizes[2 + d], " times ", stride[d]);
    out[2 + d] = sizes[2 + d] * stride[d] - cut;
  }
  return out;
}

Phase InterleaveShape::phase(int64_t row, int64_t column, const int64_t* sizes, const int64_t* from,
                             const int64_t* to) const {
  const int64_t phases = stride[0] * stride[1], channels = sizes[1] / phases / groups, place[] = {row, column};
  Phase p{{sizes[0], groups, channels},
          {from[0], phases * channels * from[1], from[1]},
          {to[0], channels * to[1], to[1]},
          (row * stride[1] + column) * channels * from[1],
          0};
  for (int64_t d = 0; d < 2; ++d) {
    const int64_t before = crop[2 - 2 * d], size = sizes[2 + d] * stride[d] - before - crop[3 - 2 * d];
    const int64_t first = ((place[d] - before) % stride[d] + stride[d]) % stride[d];  // in the output
    p.sizes[3 + d] = size > first ? (size - first + stride[d] - 1) / stride[d] : 0;
    p.from[3 + d] = from[2 + d];
    p.to[3 + d] = to[2 + d] * stride[d];
    p.from_offset += (first + before) / stride[d] * from[2 + d];
    p.to_offset += first * to[2 + d];
  }
  return p;
}

}  // namespace pykernels
