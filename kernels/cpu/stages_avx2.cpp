#define COURIER_LANES 8
#include "stages.inl.h"

namespace courier {
const Stages& avx2_stages() {
    static const Stages stages = make_stages("avx2");
    return stages;
}
}  // namespace courier
