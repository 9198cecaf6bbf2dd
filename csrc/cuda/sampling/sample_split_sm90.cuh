// Top-p with penalties of many rows, where p comes as a tensor: two launches, each row is taken by one.
#pragma once

namespace attnkit::sampling {

// From this p on sample_cut_sm90.cuh is the sooner: most of what arrives early is kept. Mirrors CUT_FROM in
// attnkit/backends/cuda/builds/sampling.py.
constexpr float kCutFrom = 0.6f;

}  // namespace attnkit::sampling
