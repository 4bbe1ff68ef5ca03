#include "cpu/conv/winograd_driver.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <random>

namespace pykernels {
namespace {

// G of F(m x m, 3x3).
constexpr double kTwo[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
constexpr double kFour[6][3] = {{1. / 4, 0, 0},
                                {-1. / 6, -1. / 6, -1. / 6},
                                {-1. / 6, 1. / 6, -1. / 6},
                                {1. / 24, 1. / 12, 1. / 6},
                                {1. / 24, -1. / 12, 1. / 6},
                                {0, 0, 1}};

// What else costs time, in multiplications that take as long: a weight read from memory, a channel of a position
// transformed.
constexpr double kRead = 14, kTransform = 12;
constexpr double kWorthwhile = 1.2;  // times as fast
constexpr int64_t kMostBytes = int64_t{1} << 27;
// Bytes that a block of tiles has between its transforms: what stays in L2, or half of the weights that it reads anew.
constexpr int64_t kLeastMemory = 1 << 20, kMostMemory = 1 << 23;

std::atomic<bool>& allowed() {
  static std::atomic<bool> on = [] {
    const char* wanted = std::getenv("PYKERNELS_WINOGRAD");
    return wanted == nullptr || std::strcmp(wanted, "0") != 0;
  }();
  return on;
}

// Outputs along a side that a tap `offset` pixels away from them finds in the image.
int64_t valid(int64_t outputs, int64_t size, int64_t offset) {
  return std::max<int64_t>(0, std::min(outputs, size - offset) - std::max<int64_t>(0, -offset));
}

template <int n>
void transform(const double (&g)[n][3], const PackedView& w, WinogradWeights::Block* to) {
  const int64_t panels = w.panels_per_group(), channels = w.h.k;
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t c = 0; c < channels; ++c) {
      double weight[9][kColumns], half[n][3][kColumns];
      for (int64_t t = 0; t < 9; ++t) {
        float column[kColumns];
        std::memcpy(column, w.panels + panel * w.panel_bytes() + (t * channels + c) * kBlockBytes, kBlockBytes);
        std::copy_n(column, kColumns, weight[t]);
      }
      for (int i = 0; i < n; ++i)
        for (int x = 0; x < 3; ++x)
          for (int64_t j = 0; j < kColumns; ++j)
            half[i][x][j] = g[i][0] * weight[x][j] + g[i][1] * weight[3 + x][j] + g[i][2] * weight[6 + x][j];
      for (int i = 0; i < n; ++i)
        for (int k = 0; k < n; ++k) {
          float* u = to[((i * n + k) * panels + panel) * channels + c].column;
          for (int64_t j = 0; j < kColumns; ++j)
            u[j] = static_cast<float>(g[k][0] * half[i][0][j] + g[k][1] * half[i][1][j] + g[k][2] * half[i][2][j]);
        }
    }
}

// Of words of 16 bytes, in four lanes; seeded anew in each process, so that nobody can make weights that are taken for
// others.
uint64_t hash_of(const uint8_t* data, int64_t bytes) {
  static const uint64_t seed = uint64_t{std::random_device{}()} << 32 | std::random_device{}();
  constexpr uint64_t kPrimes[4] = {0xa0761d6478bd642full, 0xe7037ed1a0b428dbull, 0x8ebc6af09c88c6e3ull,
                                   0x589965cc75374cc3ull};
  const auto mix = [](uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  };
  uint64_t lane[4] = {seed, seed + 1, seed + 2, seed + 3};
  for (int64_t i = 0; i + 64 <= bytes; i += 64)
    for (int k = 0; k < 4; ++k) {
      uint64_t word[2];
      std::memcpy(word, data + i + 16 * k, 16);
      lane[k] = mix(word[0] ^ kPrimes[k], word[1] ^ lane[k]) + lane[k];
    }
  return mix(mix(lane[0] ^ kPrimes[0], lane[1] ^ kPrimes[1]), mix(lane[2] ^ kPrimes[2], lane[3] ^ kPrimes[3]));
}

struct Entry {
  uint64_t hash;
  int64_t n, k, m;
  std::weak_ptr<const WinogradWeights> weights;
  std::shared_ptr<const WinogradWeights> kept;  // or null
};
constexpr size_t kKeptBytes = size_t{1} << 30;
std::mutex entries_lock;
std::list<Entry> entries;  // those asked for last come first

size_t bytes_of(const WinogradWeights& w) { return w.blocks.size() * sizeof(WinogradWeights::Block); }

}  // namespace

bool winograd_allowed() { return allowed().load(std::memory_order_relaxed); }
bool set_winograd(bool on) { return allowed().exchange(on); }

int64_t winograd_tile(const ConvShape& s, const PackedView& w) {
  if (!winograd_allowed() || w.h.element != Element::f32 || w.h.kind != PackKind::dot || s.groups != 1 || s.kh != 3 ||
      s.kw != 3 || s.sh != 1 || s.sw != 1 || s.dh != 1 || s.dw != 1 || s.c % kColumns != 0 || s.c < 32 || s.o < 32)
    return 0;
  const auto c = static_cast<double>(s.c), o = static_cast<double>(w.padded_n());
  int64_t rows = 0, columns = 0;
  for (int64_t t = 0; t < 3; ++t) rows += valid(s.oh, s.h, t - s.top), columns += valid(s.ow, s.w, t - s.left);
  const double direct = (static_cast<double>(rows) * static_cast<double>(columns) + 9 * kRead) * c * o;
  double best = direct / kWorthwhile;
  int64_t chosen = 0;
  for (const int64_t m : {2, 4}) {
    const int64_t n = m + 2;
    const double tiles = static_cast<double>(ceil_div(s.oh, m)) * static_cast<double>(ceil_div(s.ow, m));
    const double cost = static_cast<double>(n * n) * ((tiles + kRead) * c * o + tiles * kTransform * (c + o));
    if (cost < best && static_cast<double>(n * n) * c * o * 4 <= static_cast<double>(kMostBytes))
      best = cost, chosen = m;
  }
  return chosen;
}

std::shared_ptr<const WinogradWeights> winograd_weights(const PackedView& w, int64_t m, bool keep) {
  const uint64_t hash = hash_of(w.panels, w.panels_per_group() * w.panel_bytes());
  std::shared_ptr<const WinogradWeights> found;
  {
    const std::lock_guard<std::mutex> guard(entries_lock);
    for (auto e = entries.begin(); e != entries.end();) {
      if (e->hash == hash && e->n == w.h.n && e->k == w.h.k && e->m == m) found = e->weights.lock();
      if (found) {
        if (keep) e->kept = found;
        entries.splice(entries.begin(), entries, e);
        return found;
      }
      e = e->weights.expired() ? entries.erase(e) : std::next(e);
    }
  }
  const auto made = std::make_shared<WinogradWeights>();
  made->m = m;
  made->blocks.resize((m + 2) * (m + 2) * w.panels_per_group() * w.h.k);
  if (m == 2)
    transform(kTwo, w, made->blocks.data());
  else
    transform(kFour, w, made->blocks.data());
  found = made;
  const std::lock_guard<std::mutex> guard(entries_lock);
  entries.push_front({hash, w.h.n, w.h.k, m, found, keep ? found : nullptr});
  size_t bytes = 0;
  for (Entry& e : entries)
    if (e.kept && (bytes += bytes_of(*e.kept)) > kKeptBytes) e.kept.reset();
  return found;
}

void forget_winograd_weights() {
  const std::lock_guard<std::mutex> guard(entries_lock);
  for (Entry& e : entries) e.kept.reset();
  entries.remove_if([](const Entry& e) { return e.weights.expired(); });
}

WinogradDriver::WinogradDriver(const ConvShape& shape, const PackedView& weights, const Epilogue& e,
                               std::shared_ptr<const WinogradWeights> transformed, int64_t threads)
    : s_(shape),
      packed_(weights),
      e_(e),
      u_(std::move(transformed)),
      dot_(&dot_kernel(packed_)),
      epilogue_(epilogue_kernel(Element::f32)),
      kernel_(u_->m == 2 ? winograd_kernels().two : winograd_kernels().four),
      m_(u_->m),
      down_(ceil_div(s_.oh, m_)),
      across_(ceil_div(s_.ow, m_)),
      row_(s_.c + kColumns) {  // whatever the channels, neighbours do not share the sets of L1
  if (s_.n == 0) return;
  split(threads);
  tasks = tile_splits_ * panel_splits_;
  const int64_t columns = ceil_div(packed_.panels_per_group(), panel_splits_) * kColumns;
  const int64_t tiles = ceil_div(all_tiles(), tile_splits_);
  const int64_t memory = std::clamp(positions() * s_.c * columns * 2, kLeastMemory, kMostMemory);
  block_ = std::max(memory / (positions() * (s_.c + columns) * 4), dot_->max_rows * int64_t{2});
  block_ = ceil_div(tiles, ceil_div(tiles, block_));
  v_step_ = block_ * row_ + kColumns;
  scratch = 4 * (s_.c + positions() * (v_step_ + block_ * columns + kColumns) + m_ * m_ * columns);
}

// The split of least work for the slowest thread, in multiplications of a panel and channel.
void WinogradDriver::split(int64_t threads) {
  folded_.fold(e_, packed_);
  const int64_t panels = packed_.panels_per_group();
  double least = HUGE_VAL;
  for (int64_t i = std::min(threads, all_tiles()); i >= 1; --i) {
    const int64_t k = std::min(std::max<int64_t>(threads / i, 1), panels);
    const auto tiles = static_cast<double>(ceil_div(all_tiles(), i)),
               columns = static_cast<double>(ceil_div(panels, k));
    const double work = tiles * (columns + kTransform / kColumns) + kRead * columns;
    if (work < least) least = work, tile_splits_ = i, panel_splits_ = k;
  }
}

int64_t WinogradDriver::operations() const { return operations_of(all_tiles() * positions(), s_.c * s_.o); }

void WinogradDriver::bind(const uint8_t* const* in, uint8_t* out) {
  x_ = reinterpret_cast<const float*>(in[0]);
  e_.residual = in[1];
  e_.out = out;
}

// A task's panels and its memory.
struct WinogradDriver::Work {
  int64_t first_panel, panels;
  float *zeros, *v, *sums, *pixels;

  int64_t columns() const { return panels * kColumns; }
};

// V of `count` tiles.
void WinogradDriver::bring(const Work& w, int64_t tile, int64_t count) const {
  const int64_t n = m_ + 2;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t line = (tile + i) / across_, image = line / down_;
    const int64_t top = line % down_ * m_ - s_.top, left = (tile + i) % across_ * m_ - s_.left;
    const float* pixel[36];
    for (int64_t y = 0; y < n; ++y)
      for (int64_t x = 0; x < n; ++x) {
        const int64_t iy = top + y, ix = left + x;
        const bool in = iy >= 0 && iy < s_.h && ix >= 0 && ix < s_.w;
        pixel[y * n + x] = in ? x_ + ((image * s_.h + iy) * s_.w + ix) * s_.c : w.zeros;
      }
    kernel_.input({pixel, s_.c, w.v + i * row_, v_step_});
  }
}

// Sums of `count` tiles, [positions][groups of panels][tiles][columns of a group], and their outputs.
void WinogradDriver::multiply(const Work& w, int64_t tile, int64_t count) const {
  const int64_t pieces = ceil_div(count, int64_t{dot_->max_rows}), most = ceil_div(count, pieces);
  const int64_t groups = ceil_div(w.panels, int64_t{dot_->max_panels[most]});
  const int64_t panel_blocks = s_.c, step = block_ * w.columns() + kColumns;
  const auto group = [&](int64_t g) { return w.panels * g / groups; };
  const DotTap tap{0, 0};
  for (int64_t position = 0; position < positions(); ++position) {
    const auto* u = u_->blocks.data() + (position * packed_.panels_per_group() + w.first_panel) * panel_blocks;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t panels = group(g + 1) - group(g);
      float* sums = w.sums + position * step + group(g) * kColumns * count;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first = count * piece / pieces, rows = count * (piece + 1) / pieces - first;
        const uint8_t* a[kMaxRows];
        for (int64_t r = 0; r < rows; ++r)
          a[r] = reinterpret_cast<const uint8_t*>(w.v + position * v_step_ + (first + r) * row_);
        DotArgs args{a, 0, 0, &tap, 1, s_.c};
        args.panels = reinterpret_cast<const uint8_t*>(u + group(g) * panel_blocks);
        args.panel_bytes = panel_blocks * kBlockBytes;
        args.c = sums + first * panels * kColumns;
        dot_->tile[rows][panels](args);
      }
    }
  }
  const int64_t column = w.first_panel * kColumns, columns = std::min(w.columns(), s_.o - column);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t wide = (group(g + 1) - group(g)) * kColumns, before = group(g) * kColumns;
      kernel_.output({w.sums + before * count + i * wide, step, wide, w.pixels + before, w.columns()});
    }
    const int64_t line = (tile + i) / across_, top = line % down_ * m_, left = (tile + i) % across_ * m_;
    for (int64_t y = 0; y < std::min(m_, s_.oh - top); ++y)
      epilogue_(e_, {w.pixels + y * m_ * w.columns(), w.columns(), (line / down_ * s_.oh + top + y) * s_.ow + left,
                     std::min(m_, s_.ow - left), column, column, columns});
  }
}

void WinogradDriver::run(int64_t task, uint8_t* memory) const {
  const int64_t panels = packed_.panels_per_group(), i = task / panel_splits_, k = task % panel_splits_;
  Work w{};
  w.first_panel = panels * k / panel_splits_;
  w.panels = panels * (k + 1) / panel_splits_ - w.first_panel;
  w.zeros = reinterpret_cast<float*>(memory);
  w.v = w.zeros + s_.c;
  w.sums = w.v + positions() * v_step_;
  w.pixels = w.sums + positions() * (block_ * w.columns() + kColumns);
  std::fill_n(w.zeros, s_.c, 0.0f);
  const int64_t last = all_tiles() * (i + 1) / tile_splits_;
  for (int64_t tile = all_tiles() * i / tile_splits_; tile < last; tile += block_) {
    const int64_t count = std::min(block_, last - tile);
    bring(w, tile, count);
    multiply(w, tile, count);
  }
}

ConvProducts conv_products(const ConvShape& s, const PackedView& weights, const Epilogue& e, uint8_t fill, uint8_t flip,
                           const Tiling& tiling, int64_t threads, Weights are) {
  if (const int64_t m = are == Weights::once ? 0 : winograd_tile(s, weights)) {
    const auto u = winograd_weights(weights, m, are == Weights::called);
    auto driver = std::make_unique<WinogradDriver>(s, weights, e, u, threads);
    const int64_t operations = driver->operations();
    return {std::move(driver), "Winograd convolution", operations, static_cast<int64_t>(bytes_of(*u))};
  }
  TileProblem problem = conv_problem(s, weights, e, fill, flip);
  problem.tiling = tiling;
  return {std::make_unique<TileDriver>(problem, threads), "convolution",
          operations_of(s.n * s.o * s.oh * s.ow, weights.taps() * weights.h.k), weights.h.bytes};
}

}  // namespace pykernels
