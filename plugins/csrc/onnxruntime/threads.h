// The threads of a session.

#ifndef EORACC_ONNXRUNTIME_THREADS_H_
#define EORACC_ONNXRUNTIME_THREADS_H_

#include "onnxruntime/c_api.h"

namespace eoracc::ort {

// Lends the threads of the session to the kernel. The first failure is kept until it returns.
struct Lender {
  const Api* api;
  const KernelContext* context;
  Status* failure = nullptr;

  static void run(void* pool, size_t count, void (*task)(void*, size_t), void* data) {
    Lender& lender = *static_cast<Lender*>(pool);
    Status* failure = lender.api->parallel_for(lender.context, task, count, 0, data);
    if (failure == nullptr) return;
    if (lender.failure == nullptr) {
      lender.failure = failure;
    } else {
      lender.api->release_status(failure);
    }
  }
};

}  // namespace eoracc::ort

#endif  // EORACC_ONNXRUNTIME_THREADS_H_
