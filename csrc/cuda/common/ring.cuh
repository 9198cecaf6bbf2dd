// A place in a ring of so many stages as the launch says: which one, and the parity that its barrier is waited for with.
#pragma once
#include "ptx_sm90.cuh"

namespace attnkit {

struct StageRing {
  int stages, stage = 0;
  u32 parity = 0;
  ATTNKIT_DEVICE explicit StageRing(int stages) : stages(stages) {}
  ATTNKIT_DEVICE void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

}  // namespace attnkit
