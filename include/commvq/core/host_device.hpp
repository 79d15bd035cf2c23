#pragma once

/// Marks functions of headers that device code calls, too.
#ifdef __CUDACC__
#define COMMVQ_HOST_DEVICE __host__ __device__
#else
#define COMMVQ_HOST_DEVICE
#endif
