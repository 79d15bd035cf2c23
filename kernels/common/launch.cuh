#pragma once

#include <cuda_runtime_api.h>

namespace commvq::cuda {

/// Lets the next kernel of the stream start its blocks while this one's still run; what it must not
/// read before this kernel has ended comes after its `wait_for_previous_kernel`.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}
/// Waits until the previous kernel of the stream has ended and its writes are seen. Nothing to wait
/// for where the kernel was not launched early.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

/// Waits for the previous kernel of the stream and only then lets the next one start, which so may
/// read, before its own wait, what kernels before this one wrote.
__device__ __forceinline__ void start_after_previous_kernel() {
  wait_for_previous_kernel();
  let_next_kernel_start();
}

/// Launches a kernel that may start before the previous one of the stream has ended (programmatic
/// dependent launch), on devices that can; it must call `wait_for_previous_kernel`.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                         cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace commvq::cuda
