// For functions that the host and the GPU run from the same source.
#pragma once

#if defined(__CUDACC__)
#define FASTCLIP_BOTH __host__ __device__
#else
#define FASTCLIP_BOTH
#endif
