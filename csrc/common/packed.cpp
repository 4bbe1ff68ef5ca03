#include "common/packed.h"

#include <cstddef>
#include <initializer_list>

namespace pykernels {
namespace {

constexpr char kMagic[8] = {'P', 'K', 'P', 'A', 'C', 'K', '0', '1'};

uint64_t hash_header(const PackedHeader& h) {  // FNV-1a
  uint64_t hash = 1469598103934665603ull;
  const auto* bytes = reinterpret_cast<const unsigned char*>(&h);
  for (size_t i = 0; i < offsetof(PackedHeader, hash); ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
  return hash;
}

int64_t per_word(Element e) { return 4 / element_bytes(e); }

// One output channel's [k][taps] into its column of a panel.
template <class T>
void scatter(const PackedHeader& h, int64_t taps, int64_t words, const uint8_t* row, uint8_t* panel) {
  constexpr int64_t kpw = 4 / sizeof(T);
  const bool depthwise = h.kind == PackKind::depthwise;
  for (int64_t k = 0; k < h.k; ++k) {
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t along = depthwise ? t : k;  // what runs along the words
      const int64_t block = (depthwise ? 0 : t * words) + along / kpw;
      std::memcpy(panel + block * kBlockBytes + along % kpw * sizeof(T), row + (k * taps + t) * sizeof(T), sizeof(T));
    }
  }
}

}  // namespace

int64_t PackedView::words() const {
  return h.kind == PackKind::dot ? ceil_div(h.k, per_word(h.element)) : ceil_div(taps(), per_word(h.element));
}

int64_t PackedView::panel_bytes() const { return (h.kind == PackKind::dot ? taps() : 1) * words() * kBlockBytes; }

PackedHeader make_header(PackKind kind, Element element, int64_t groups, int64_t n, int64_t k, int64_t kh, int64_t kw,
                         bool has_bias) {
  PackedHeader h;
  std::memset(&h, 0, sizeof h);
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.version = 1;
  h.kind = kind;
  h.element = element;
  h.has_bias = has_bias;
  h.groups = groups;
  h.n = n;
  h.k = k;
  h.kh = kh;
  h.kw = kw;
  PackedView v;
  v.h = h;
  const int64_t channels = groups * v.padded_n();
  h.scale_offset = int64_t{sizeof(PackedHeader)} + groups * v.panels_per_group() * v.panel_bytes();
  h.bias_offset = h.scale_offset + 4 * channels;
  h.sum_offset = h.bias_offset + 4 * channels;
  h.bytes = h.sum_offset + 4 * channels;
  h.hash = hash_header(h);
  return h;
}

const char* read_packed(const void* data, int64_t bytes, PackedView* view) {
  if (bytes < int64_t{sizeof(PackedHeader)}) return "it is shorter than a packed header";
  std::memcpy(&view->h, data, sizeof(PackedHeader));
  const PackedHeader& h = view->h;
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) != 0) return "it was not made by a pykernels *_pack op";
  if (h.hash != hash_header(h)) return "its header is damaged";
  if (h.version != 1) return "it was packed by another version of pykernels: pack the weights again";
  if (h.kind != PackKind::dot && h.kind != PackKind::depthwise)
    return "it was packed on a CUDA device: pack the weights on the CPU";
  // Where its parts lie follows from its sizes, and is believed only where it says so.
  const bool depthwise = h.kind == PackKind::depthwise;
  bool sane = h.element >= Element{} && static_cast<int>(h.element) < PK_ELEMENTS(PK_COUNTED);
  int64_t weights = 1;
  for (int64_t size : {h.groups, h.n, h.k, h.kh, h.kw})
    sane = sane && size >= 0 && size < (int64_t{1} << 31) && !__builtin_mul_overflow(weights, size + 64, &weights);
  sane = sane && weights < (int64_t{1} << 56) && h.groups > 0 && h.kh > 0 && h.kw > 0 && (h.k > 0 || h.kh * h.kw == 1);
  sane = sane && (!depthwise || (h.groups == 1 && h.k == 1)) && (h.has_bias == 0 || h.has_bias == 1);
  if (!sane) return "its header is damaged";
  const PackedHeader right = make_header(h.kind, h.element, h.groups, h.n, h.k, h.kh, h.kw, h.has_bias);
  if (std::memcmp(&right, &h, sizeof h) != 0) return "its header is damaged";
  if (h.bytes != bytes) return "it is truncated or padded";
  const auto* base = static_cast<const uint8_t*>(data);
  view->panels = base + sizeof(PackedHeader);
  view->scale = reinterpret_cast<const float*>(base + h.scale_offset);
  view->bias = h.has_bias ? reinterpret_cast<const float*>(base + h.bias_offset) : nullptr;
  view->sum = reinterpret_cast<const int32_t*>(base + h.sum_offset);
  return nullptr;
}

void write_header(const PackedHeader& h, void* out) {
  std::memset(out, 0, h.bytes);
  std::memcpy(out, &h, sizeof h);
}

void pack_channels(const PackedHeader& h, const void* weight, const float* scale, const float* bias, void* out,
                   int64_t first, int64_t last) {
  auto* base = static_cast<uint8_t*>(out);
  PackedView v;
  v.h = h;
  const int64_t es = element_bytes(h.element), taps = v.taps(), words = v.words();
  const int64_t panel_bytes = v.panel_bytes(), panels = v.panels_per_group(), padded = v.padded_n();
  auto* scales = reinterpret_cast<float*>(base + h.scale_offset);
  auto* biases = reinterpret_cast<float*>(base + h.bias_offset);
  auto* sums = reinterpret_cast<int32_t*>(base + h.sum_offset);
  for (int64_t channel = first; channel < last; ++channel) {
    const int64_t g = channel / h.n, n = channel % h.n;
    const auto* row = static_cast<const uint8_t*>(weight) + channel * h.k * taps * es;
    uint8_t* panel = base + sizeof h + (g * panels + n / kColumns) * panel_bytes + (n % kColumns) * 4;
    if (h.kind == PackKind::dot && taps == 1) {  // whole words, as every linear has them
      const int64_t bytes = h.k * es;
      for (int64_t w = 0; w < bytes / 4; ++w) std::memcpy(panel + w * kBlockBytes, row + 4 * w, 4);
      if (bytes % 4) std::memcpy(panel + bytes / 4 * kBlockBytes, row + bytes / 4 * 4, bytes % 4);
    } else {
      switch (es) {
        case 1: scatter<uint8_t>(h, taps, words, row, panel); break;
        case 2: scatter<uint16_t>(h, taps, words, row, panel); break;
        default: scatter<uint32_t>(h, taps, words, row, panel); break;
      }
    }
    int32_t sum = 0;
    if (h.element == Element::s8)
      for (int64_t i = 0; i < h.k * taps; ++i) sum += static_cast<int8_t>(row[i]);
    scales[g * padded + n] = scale ? scale[channel] : 1.0f;
    biases[g * padded + n] = bias ? bias[channel] : 0.0f;
    sums[g * padded + n] = sum;
  }
}

}  // namespace pykernels
