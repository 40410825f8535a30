#define COURIER_LANES 4  // what SSE2 and NEON have
#include "stages.inl.h"

namespace courier {
const Stages& portable_stages() {
    static const Stages stages = make_stages("portable");
    return stages;
}
}  // namespace courier
