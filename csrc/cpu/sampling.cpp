// sample on the CPU: one row a task. Baseline build of the loops, selection, registration.
//
// No row is ever sorted. top-k keeps a threshold while the row streams by and buffers what exceeds it; top-p over a whole
// vocabulary takes a histogram of masses and orders only the bin in which p falls; both then finish on the survivors.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#define ATTNKIT_ISA scalar
#include "sampling_kernel.h"
#include "isa.h"
#include "parallel.h"

namespace py = pybind11;

namespace attnkit::cpu {

const SampleOps sample_scalar = scalar::kOps;

namespace {

float uniform(uint32_t x) { return std::min((static_cast<float>(x) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f); }

// E ~ Exp(1), never fused.
float exponential(uint32_t x) {
  const float u = uniform(x);
  // -log(1 - u) as a series: small E keeps all its bits
  if (u < 0.02f) return u * (1.0f + u * (0.5f + u * (1.0f / 3.0f + u * (0.25f + u / 5.0f))));
  return -std::log(1.0f - u);
}

}  // namespace

float gumbel_noise(uint32_t x) { return -std::log(exponential(x)); }

float logarithm(float x) { return std::log(x); }

namespace {

struct FourWords {
  uint32_t x[4];
};

FourWords philox_words(uint32_t counter, Noise noise, Words words) {
  uint32_t k0 = static_cast<uint32_t>(noise.seed), k1 = static_cast<uint32_t>(noise.seed >> 32);
  uint32_t c0 = counter, c1 = static_cast<uint32_t>(noise.offset), c2 = static_cast<uint32_t>(noise.offset >> 32), c3 = words;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The first id of a group, and the distance of its number i from that.
int64_t first_of_group(int64_t group) { return group / 32 * kPiece + group % 32 * 4; }
int64_t place_in_group(int i) { return i / 4 * (kPiece / 4) + i % 4; }

constexpr float kLowest = -std::numeric_limits<float>::max();
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// Orders tokens by logit descending, then id ascending, as unsigned integers ascending.
uint64_t key_of(float l, int32_t id) {
  const uint32_t u = bits_of(l + 0.0f);  // -0 becomes 0
  const uint32_t ascending = u ^ (u >> 31 ? 0xffffffffu : 0x80000000u);
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(id);
}

float logit_of(uint64_t key) {
  const uint32_t ascending = ~static_cast<uint32_t>(key >> 32);
  return float_of(ascending ^ (ascending >> 31 ? 0x80000000u : 0xffffffffu));
}

int32_t id_of(uint64_t key) { return static_cast<int32_t>(key); }

// l / t as SampleOps::divide has it.
float divided(float l, float t) {
  return l == kMinusInf ? l : std::max(std::min(l / t, -kLowest), kLowest);
}

// The k first tokens of a row (logit / t descending, id ascending), from logits that stream by in order of id.
class TopK {
 public:
  void start(const SampleOps& ops, int64_t k, int64_t V, float t) {
    ops_ = &ops, k_ = k, t_ = t, count_ = 0, limit_ = kMinusInf;
    room_ = std::min(2 * k + 512, V + kPad) + kPad;
    if (static_cast<int64_t>(values_.size()) < room_ + kPad) values_.resize(room_ + kPad), ids_.resize(room_ + kPad);
    keys_.clear();
  }

  // n padded logits whose ids count from `at`.
  void add(const float* l, int64_t n, int64_t at) {
    for (int64_t i = 0;;) {
      i = ops_->scan(l, i, n, at, limit_, values_.data(), ids_.data(), room_ - static_cast<int64_t>(keys_.size()), &count_);
      if (i >= n) return;
      compact();
    }
  }

  // The survivors, not in order; at most k.
  std::vector<uint64_t>& finish() {
    compact();
    return keys_;
  }

 private:
  void compact() {
    for (int64_t i = 0; i < count_; ++i) keys_.push_back(key_of(t_ == 1.0f ? values_[i] : divided(values_[i], t_), ids_[i]));
    count_ = 0;
    if (static_cast<int64_t>(keys_.size()) < k_) return;
    std::nth_element(keys_.begin(), keys_.begin() + (k_ - 1), keys_.end());
    keys_.resize(k_);
    // What comes later loses a tie, so it must exceed the k-th. The limit is held before the division: any l whose
    // quotient is not above the k-th's serves, the largest such saves most.
    const float last = logit_of(keys_[k_ - 1]);
    limit_ = last;
    if (t_ != 1.0f) {
      limit_ = last * t_;
      for (int step = 0; step < 4 && divided(limit_, t_) <= last; ++step) limit_ = std::nextafter(limit_, -kLowest);
      while (divided(limit_, t_) > last) limit_ = std::nextafter(limit_, kMinusInf);
    }
  }

  const SampleOps* ops_ = nullptr;
  int64_t k_ = 0, count_ = 0, room_ = 0;
  float t_ = 1.0f, limit_ = kMinusInf;
  std::vector<float> values_;
  std::vector<int32_t> ids_;
  std::vector<uint64_t> keys_;
};

struct Mass {
  uint64_t key;
  double mass;
};

// Keeps, of tokens in the order of their keys, those before which less than `target` of mass lies; `before` lies before
// all of them. Selection by halves, not a sort: linear in their number. Returns how many; they are then the first.
int64_t nucleus(std::vector<Mass>& list, double before, double target) {
  const auto order = [](const Mass& a, const Mass& b) { return a.key < b.key; };
  int64_t low = 0, high = static_cast<int64_t>(list.size());
  while (high - low > 64) {
    const int64_t middle = low + (high - low) / 2;
    std::nth_element(list.begin() + low, list.begin() + middle, list.begin() + high, order);
    double mass = 0.0;
    for (int64_t i = low; i < middle; ++i) mass += list[i].mass;
    if (before + mass >= target) {
      high = middle;
    } else {
      before += mass;
      low = middle;
    }
  }
  std::sort(list.begin() + low, list.begin() + high, order);
  while (low < high && before < target) before += list[low++].mass;
  return low;
}

struct SampleCall {
  int dtype;
  int64_t B, V, stride;
  const char* logits;
  const int64_t* seeds;
  // A number, or this row's entry of a tensor [B].
  float temperature, top_p, min_p, repetition, presence, frequency;
  int64_t top_k, offset;
  const float *temperatures, *top_ps, *min_ps, *repetitions, *presences, *frequencies;
  const int64_t *top_ks, *offsets;
  const int32_t* counts;
  const uint8_t* prompt_mask;
  const float* bias;
  const int32_t* allowed;
  int64_t counts_stride, prompt_stride, bias_stride, allowed_stride;
  int64_t* tokens;
  bool* valid;
  float* logprobs;  // [B, 1 + n] or null
  int64_t* top_ids;
  int64_t n;
};

// One thread's sampler: the options of the row in hand, and memory that rows share.
class Row {
 public:
  void run(const SampleCall& c, const SampleOps& ops, int64_t b) {
    c_ = &c, ops_ = &ops, b_ = b;
    logits_ = c.logits + b * c.stride * size();
    const auto number = [b](auto value, const auto* tensor) { return tensor ? tensor[b] : value; };
    penalties_ = {number(c.repetition, c.repetitions), number(c.frequency, c.frequencies), number(c.presence, c.presences),
                  c.counts ? c.counts + b * c.counts_stride : nullptr,
                  c.prompt_mask ? c.prompt_mask + b * c.prompt_stride : nullptr,
                  c.bias ? c.bias + b * c.bias_stride : nullptr, c.allowed ? c.allowed + b * c.allowed_stride : nullptr};
    t_ = number(c.temperature, c.temperatures);
    p_ = number(c.top_p, c.top_ps);
    min_p_ = number(c.min_p, c.min_ps);
    k_ = number(c.top_k, c.top_ks);
    if (k_ <= 0 || k_ >= c.V) k_ = 0;
    noise_ = {static_cast<uint64_t>(c.seeds[b]), static_cast<uint64_t>(number(c.offset, c.offsets))};
    best_ = {kMinusInf, -1};
    nan_ = false;
    chunk_.resize(kChunk + kPad);
    if (t_ == 0.0f || k_ == 1)
      greedy();
    else if (k_ > 0)
      among_k();
    else if (p_ < 1.0f || min_p_ > 0.0f)
      in_two_passes();
    else
      everything();
    const bool valid = !nan_ && best_.id >= 0;
    c.tokens[b] = valid ? best_.id : 0;
    c.valid[b] = valid;
    if (c.logprobs) write_logprobs();
  }

 private:
  int64_t size() const { return c_->dtype == kFloat32 ? 4 : 2; }

  // body(block, at, n): the prepared logits [at, at + n), divided by t, block by block; kept in `keep` or thrown away.
  template <class Body>
  void stream(float t, float* keep, const Body& body) {
    const bool plain = !(penalties_.counts || penalties_.prompt || penalties_.bias || penalties_.allowed);
    for (int64_t at = 0; at < c_->V; at += kChunk) {
      const int64_t n = std::min(kChunk, c_->V - at);
      float* block = keep ? keep + at : chunk_.data();
      nan_ |= ops_->load(logits_ + at * size(), c_->dtype, n, block);
      if (!plain) ops_->penalise(block, at, n, penalties_);
      const int64_t full = (n + kPad - 1) / kPad * kPad;
      if (t != 1.0f) ops_->divide(block, full, t);
      body(block, at, full);
    }
  }

  void greedy() {
    // k = 1 is greedy too, but its ties are those after the division.
    stream(t_ == 0.0f ? 1.0f : t_, nullptr, [&](const float* block, int64_t at, int64_t n) {
      const float top = ops_->top(block, n);
      if (top > best_.score) best_ = {top, at + (std::find(block, block + n, top) - block)};
    });
  }

  void everything() {
    stream(t_, nullptr, [&](float* block, int64_t at, int64_t n) { try_groups(block, n, at); });
    if (best_.id >= 0) best_.id = token_of_group();
  }

  // The groups of n tokens, in memory for whole blocks.
  void try_groups(float* l, int64_t n, int64_t at) {
    const int64_t full = (n + kBlock - 1) / kBlock * kBlock;
    std::fill(l + n, l + full, kMinusInf);
    ops_->groups(l, full, at, noise_, &best_, inside_);
  }

  // Which of a group's 16 logits the choice falls on; ``mass``: their exp(x - top).
  int choose_inside(const float* logits, float top, int64_t group, double mass[16]) const {
    double to[16], sum = 0.0;
    for (int i = 0; i < 16; ++i) to[i] = sum += mass[i] = std::exp(static_cast<double>(logits[i]) - static_cast<double>(top));
    const double reach = static_cast<double>(uniform(philox_words(static_cast<uint32_t>(group), noise_, kInside).x[0])) * sum;
    return static_cast<int>(std::upper_bound(to, to + 15, reach) - to);
  }

  // The token of the best group, whose logits are `inside_`.
  int64_t token_of_group() const {
    double mass[16];
    const int i = choose_inside(inside_, *std::max_element(inside_, inside_ + 16), best_.id, mass);
    return first_of_group(best_.id) + place_in_group(i);
  }

  // The first token to arrive of those whose keys are below `limit`: see draw_by_arrival in attnkit/reference.py. Mostly the
  // token of the best group, which is the first of all.
  void arrive(float top, uint64_t limit) {
    if (best_.id < 0) return;
    best_.id = token_of_group();
    if (key_of(row_[best_.id], static_cast<int32_t>(best_.id)) < limit) return;
    float best = kMinusInf;
    for (int64_t group = 0; group < (c_->V + kBlock - 1) / kBlock * (kBlock / 16); ++group) {
      float x[16];
      for (int i = 0; i < 16; ++i) x[i] = row_[first_of_group(group) + place_in_group(i)];
      if (*std::max_element(x, x + 16) == kMinusInf) continue;
      double mass[16], sum = 0.0;
      const int first = choose_inside(x, top, group, mass);
      for (const double one : mass) sum += one;
      const FourWords words = philox_words(static_cast<uint32_t>(group / 128 * 32 + group % 32), noise_, kOfGroups);
      const double time = exponential(words.x[group / 32 % 4]) / sum;
      if (!(static_cast<float>(top - std::log(time)) > best)) continue;
      double earliest = std::numeric_limits<double>::infinity();
      int64_t token = 0;
      for (int i = 0; i < 16; ++i) {
        const int64_t id = first_of_group(group) + place_in_group(i);
        if (x[i] == kMinusInf || key_of(x[i], static_cast<int32_t>(id)) >= limit) continue;
        const FourWords own = philox_words(static_cast<uint32_t>(id / 4), noise_, kOfTokens);
        const double at = i == first ? time : time + exponential(own.x[id % 4]) / mass[i];
        if (at < earliest) earliest = at, token = id;
      }
      const float score = static_cast<float>(top - std::log(earliest));
      if (score > best) best = score, best_.id = token;
    }
  }

  void among_k() {
    // Division is monotone for an ordinary temperature, and then few logits need it.
    const bool ordinary = t_ > 1e-4f && t_ < 1e4f;
    top_.start(*ops_, k_, c_->V, ordinary ? t_ : 1.0f);
    stream(ordinary ? 1.0f : t_, nullptr, [&](const float* block, int64_t at, int64_t n) { top_.add(block, n, at); });
    choose(top_.finish());
  }

  // top-p and min-p on a short list of keys, then the draw.
  void choose(const std::vector<uint64_t>& keys) {
    if (keys.empty()) return;
    const float top = logit_of(*std::min_element(keys.begin(), keys.end()));
    fill_masses(keys, top);
    int64_t kept = static_cast<int64_t>(masses_.size());
    if (p_ < 1.0f) {
      double total = 0.0;
      for (const Mass& m : masses_) total += m.mass;
      kept = std::max<int64_t>(1, nucleus(masses_, 0.0, total * static_cast<double>(p_)));
      if (kept == 1) std::nth_element(masses_.begin(), masses_.begin(), masses_.end(), first_);
    }
    if (by_arrival())
      arrive(top, end_of(kept));
    else
      draw(kept, top + std::log(min_p_));
  }

  void fill_masses(const std::vector<uint64_t>& keys, float top) {
    masses_.clear();
    for (const uint64_t key : keys)
      masses_.push_back({key, p_ < 1.0f ? std::exp(static_cast<double>(logit_of(key)) - static_cast<double>(top)) : 0.0});
  }

  // Whether the row's tokens draw as they arrive: neither top-k nor min-p holds them back.
  bool by_arrival() const { return k_ == 0 && min_p_ <= 0.0f; }

  // Larger than the keys of the first `kept` of the masses, and not than those of the others.
  uint64_t end_of(int64_t kept) const {
    uint64_t end = kept > 0 ? 0 : ~uint64_t{0};
    if (kept == 0)
      for (const Mass& m : masses_) end = std::min(end, m.key);
    for (int64_t i = 0; i < kept; ++i) end = std::max(end, masses_[i].key + 1);
    return end;
  }

  // The noise over the first `kept` of the masses, those at least `low`.
  void draw(int64_t kept, float low) {
    values_.clear(), ids_.clear();
    for (int64_t i = 0; i < kept; ++i) {
      const float l = logit_of(masses_[i].key);
      if (l >= low) values_.push_back(l), ids_.push_back(id_of(masses_[i].key));
    }
    const int64_t n = static_cast<int64_t>(values_.size());
    values_.resize(n + kPad, kMinusInf), ids_.resize(n + kPad, 0);
    ops_->noisy_list(values_.data(), ids_.data(), n, noise_, &best_);
  }

  // top-p or min-p over the whole vocabulary: the first pass finds the top, the others run from the cache.
  void in_two_passes() {
    const int64_t full = (c_->V + kPad - 1) / kPad * kPad, blocks = (c_->V + kBlock - 1) / kBlock * kBlock;
    if (static_cast<int64_t>(row_.size()) < blocks) row_.resize(blocks);
    float top = kMinusInf;
    stream(t_, row_.data(), [&](float* block, int64_t at, int64_t n) {
      top = std::max(top, ops_->top(block, n));
      if (by_arrival()) try_groups(block, n, at);
    });
    if (nan_ || top == kMinusInf) return;
    const float low = std::max(kLowest, top + std::log(min_p_));
    if (p_ >= 1.0f) {
      ops_->noisy(row_.data(), full, 0, low, top, std::numeric_limits<float>::infinity(), noise_, &best_);
      return;
    }
    if (c_->V <= 1024) {
      keys_.clear();
      for (int64_t i = 0; i < c_->V; ++i)
        if (row_[i] > kMinusInf) keys_.push_back(key_of(row_[i], static_cast<int32_t>(i)));
      choose(keys_);
      return;
    }
    double bins[kBins] = {}, total = 0.0, before = 0.0;
    ops_->histogram(row_.data(), full, top, bins);
    for (const double mass : bins) total += mass;
    const double target = total * static_cast<double>(p_);
    int bin = 0;
    while (bin < kBins - 1 && before + bins[bin] < target) before += bins[bin++];
    split(top, bin);
    const int64_t kept = std::max<int64_t>(bin == 0, nucleus(masses_, before, target));
    if (by_arrival()) return arrive(top, end_of(kept));
    if (kept == 1) std::nth_element(masses_.begin(), masses_.begin(), masses_.end(), first_);
    draw(kept, low);
    // Bins before this one are kept whole.
    if (bin > 0) ops_->noisy(row_.data(), full, 0, low, top, static_cast<float>(bin) / kBinsPerNat, noise_, &best_);
  }

  // The masses of one bin.
  void split(float top, int bin) {
    const int64_t full = (c_->V + kPad - 1) / kPad * kPad;
    values_.resize(full + kPad), ids_.resize(full + kPad);
    const float end = bin < kBins - 1 ? static_cast<float>(bin + 1) : std::numeric_limits<float>::infinity();
    const int64_t n = ops_->band(row_.data(), full, top, static_cast<float>(bin), end, values_.data(), ids_.data());
    keys_.clear();
    for (int64_t i = 0; i < n; ++i) keys_.push_back(key_of(values_[i], ids_[i]));
    fill_masses(keys_, top);
  }

  // log_softmax of the logits as given: the chosen token's, then the n highest.
  void write_logprobs() {
    const int64_t n = c_->n;
    float* values = c_->logprobs + b_ * (n + 1);
    int64_t* ids = c_->top_ids + b_ * (n + 1);
    if (n > 0) top_.start(*ops_, n, c_->V, 1.0f);
    double sum = 0.0;
    float top = kMinusInf;
    bool nan = false;
    for (int64_t at = 0; at < c_->V; at += kChunk) {
      const int64_t m = std::min(kChunk, c_->V - at), full = (m + kPad - 1) / kPad * kPad;
      nan |= ops_->load(logits_ + at * size(), c_->dtype, m, chunk_.data());
      const float higher = std::max(top, ops_->top(chunk_.data(), full));
      if (higher > top) {
        sum *= std::exp(static_cast<double>(top) - static_cast<double>(higher));
        top = higher;
      }
      if (top > kMinusInf) sum += ops_->sum_exp(chunk_.data(), full, top);
      if (n > 0) top_.add(chunk_.data(), full, at);
    }
    const bool lost = nan || top == kMinusInf;
    const double log_sum = std::log(sum);
    const auto of = [&](float l) {
      return lost ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(static_cast<double>(l) - static_cast<double>(top) - log_sum);
    };
    ids[0] = c_->tokens[b_];
    ops_->load(logits_ + ids[0] * size(), c_->dtype, 1, chunk_.data());
    values[0] = of(chunk_[0]);
    if (n == 0) return;
    keys_.clear();
    if (!lost)  // by value as rounded: what rounding made equal stands in order of id
      for (const uint64_t key : top_.finish()) keys_.push_back(key_of(of(logit_of(key)), id_of(key)));
    std::sort(keys_.begin(), keys_.end());
    const int64_t have = static_cast<int64_t>(keys_.size());
    for (int64_t i = 0; i < have; ++i) ids[1 + i] = id_of(keys_[i]), values[1 + i] = logit_of(keys_[i]);
    // Fewer finite logits than asked for: the rest are those at -inf (all, in a lost row), lowest ids first.
    for (int64_t v = 0, i = have; i < n && v < c_->V; ++v) {
      ops_->load(logits_ + v * size(), c_->dtype, 1, chunk_.data());
      if (lost || chunk_[0] == kMinusInf) ids[1 + i] = v, values[1 + i] = of(kMinusInf), ++i;
    }
  }

  const SampleCall* c_ = nullptr;
  const SampleOps* ops_ = nullptr;
  int64_t b_ = 0, k_ = 0;
  const char* logits_ = nullptr;
  Penalties penalties_{};
  float t_ = 1.0f, p_ = 1.0f, min_p_ = 0.0f;
  Noise noise_{};
  Best best_{};
  float inside_[16];
  bool nan_ = false;
  TopK top_;
  std::vector<float> chunk_, row_, values_;
  std::vector<int32_t> ids_;
  std::vector<uint64_t> keys_;
  std::vector<Mass> masses_;
  static constexpr auto first_ = [](const Mass& a, const Mass& b) { return a.key < b.key; };
};

const SampleOps& sample_ops(int isa) {
#if defined(__x86_64__)
  switch (pick_isa(isa)) {
    case kAvx512: return sample_avx512;
    case kAvx2: return sample_avx2;
    default: break;
  }
#endif
  return sample_scalar;
}

template <class T>
const T* pointer(uintptr_t p) {
  return reinterpret_cast<const T*>(p);
}

// numbers: (temperature, top_p, min_p, repetition, presence, frequency); tensors: pointers or 0 for the same, then
// top_k and offset; masks: (pointer, row stride) of counts, prompt_mask, logit_bias, allowed.
void sample(int dtype, int64_t B, int64_t V, uintptr_t logits, int64_t stride, uintptr_t seeds, const py::tuple& numbers,
            int64_t top_k, int64_t offset, const py::tuple& tensors, const py::tuple& masks, uintptr_t tokens, uintptr_t valid,
            uintptr_t logprobs, uintptr_t top_ids, int64_t n, int threads, int isa) {
  SampleCall c{};
  c.dtype = dtype, c.B = B, c.V = V, c.stride = stride, c.n = n, c.top_k = top_k, c.offset = offset;
  c.logits = pointer<char>(logits);
  c.seeds = pointer<int64_t>(seeds);
  const auto number = [&](int i) { return static_cast<float>(numbers[i].cast<double>()); };
  const auto address = [](const py::tuple& t, int i) { return t[i].cast<uintptr_t>(); };
  c.temperature = number(0), c.top_p = number(1), c.min_p = number(2);
  c.repetition = number(3), c.presence = number(4), c.frequency = number(5);
  c.temperatures = pointer<float>(address(tensors, 0)), c.top_ps = pointer<float>(address(tensors, 1));
  c.min_ps = pointer<float>(address(tensors, 2)), c.repetitions = pointer<float>(address(tensors, 3));
  c.presences = pointer<float>(address(tensors, 4)), c.frequencies = pointer<float>(address(tensors, 5));
  c.top_ks = pointer<int64_t>(address(tensors, 6)), c.offsets = pointer<int64_t>(address(tensors, 7));
  c.counts = pointer<int32_t>(address(masks, 0)), c.counts_stride = masks[1].cast<int64_t>();
  c.prompt_mask = pointer<uint8_t>(address(masks, 2)), c.prompt_stride = masks[3].cast<int64_t>();
  c.bias = pointer<float>(address(masks, 4)), c.bias_stride = masks[5].cast<int64_t>();
  c.allowed = pointer<int32_t>(address(masks, 6)), c.allowed_stride = masks[7].cast<int64_t>();
  c.tokens = reinterpret_cast<int64_t*>(tokens);
  c.valid = reinterpret_cast<bool*>(valid);
  c.logprobs = reinterpret_cast<float*>(logprobs);
  c.top_ids = reinterpret_cast<int64_t*>(top_ids);
  const SampleOps& ops = sample_ops(isa);
  py::gil_scoped_release nogil;
  parallel_for(B, threads, [&](int64_t b) {
    static thread_local Row row;
    row.run(c, ops, b);
  });
}

}  // namespace
}  // namespace attnkit::cpu

namespace attnkit {

void register_cpu_sampling(py::module_& m) { m.def("cpu_sample", &cpu::sample); }

}  // namespace attnkit
