#pragma once

#include <memory>

#include "commvq/core/error.hpp"
#include "commvq/core/view.hpp"

#include "common/device_memory.hpp"

#include <cublas_v2.h>

namespace commvq::cuda {

/// A stream of its own and cuBLAS on it. Matrices are row-major, in device memory, fp32, dense:
/// the row stride is the number of columns. All throw `Error`.
class Blas {
 public:
  enum class Form { kAsIs, kTransposed };

  Blas() {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
    stream_.reset(stream);
    cublasHandle_t handle = nullptr;
    check_blas(cublasCreate(&handle), "starting cuBLAS");
    handle_.reset(handle);
    check_blas(cublasSetStream(handle, stream), "setting cuBLAS's stream");
  }

  cudaStream_t stream() const { return stream_.get(); }

  /// c [m][n] = alpha op(a) op(b) + beta c, where op(a) is [m][k] and op(b) [k][n].
  void multiply(Form form_a, Form form_b, Index m, Index n, Index k, float alpha, const float* a,
                const float* b, float beta, float* c) const {
    if (m == 0 || n == 0) return;
    // Column-major, the transposes: c^T = op(b)^T op(a)^T.
    const auto op = [](Form form) { return form == Form::kAsIs ? CUBLAS_OP_N : CUBLAS_OP_T; };
    const auto as_int = [](Index x) { return static_cast<int>(x); };
    check_blas(cublasSgemm(handle_.get(), op(form_b), op(form_a), as_int(n), as_int(m), as_int(k),
                           &alpha, b, as_int(form_b == Form::kAsIs ? n : k), a,
                           as_int(form_a == Form::kAsIs ? k : m), &beta, c, as_int(n)),
               "multiplying matrices");
  }

 private:
  static void check_blas(cublasStatus_t status, const char* what) {
    require(status == CUBLAS_STATUS_SUCCESS, what, ": ", cublasGetStatusString(status));
  }
  struct DestroyStream {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
  };
  struct DestroyHandle {
    void operator()(cublasHandle_t handle) const { cublasDestroy(handle); }
  };
  std::unique_ptr<std::remove_pointer_t<cudaStream_t>, DestroyStream> stream_;
  std::unique_ptr<std::remove_pointer_t<cublasHandle_t>, DestroyHandle> handle_;
};

}  // namespace commvq::cuda
