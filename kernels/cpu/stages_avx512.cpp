#define COURIER_LANES 16
#include "stages.inl.h"

namespace courier {
const Stages& avx512_stages() {
    static const Stages stages = make_stages("avx512");
    return stages;
}
}  // namespace courier
