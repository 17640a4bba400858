/* A stand-in for the CUDA driver whose device memory is host memory.
 *
 * It is compiled against the real cuda.h: a function whose prototype were another one would not
 * compile, and ctypes calls it as it calls the real library. It is stricter than a driver where
 * that shows mistakes: memory begins as NaN, every copy must lie within one live allocation, work
 * asks for a current context in its thread, and a download is made when the stream is waited for.
 */

#include <cuda.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { kMaxAllocations = 1 << 16, kMaxDownloads = 1 << 12, kAlignment = 256 };

typedef struct {
  unsigned char* begin;
  size_t size;
} Allocation;

typedef struct {
  void* target;
  const void* source;
  size_t size;
} Download;

static Allocation allocations[kMaxAllocations];
static int allocation_count;
static Download downloads[kMaxDownloads];
static int download_count;
static size_t used, limit = (size_t)1 << 40;
static int devices = 1, major_capability = 8, minor_capability = 6;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local CUcontext current;
static char context_object, stream_object;

/* --- for tests ------------------------------------------------------------------------------- */

void stand_in_reset(int device_count, int major, int minor, size_t memory) {
  devices = device_count;
  major_capability = major;
  minor_capability = minor;
  limit = memory;
}

size_t stand_in_used(void) { return used; }

int stand_in_contains(unsigned long long address, size_t size) {
  const unsigned char* begin = (const unsigned char*)address;
  int found = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < allocation_count && !found; ++i) {
    const Allocation* one = &allocations[i];
    found = begin >= one->begin && begin + size <= one->begin + one->size;
  }
  pthread_mutex_unlock(&lock);
  return found;
}

/* --- the driver ------------------------------------------------------------------------------ */

static CUresult check(CUdeviceptr address, size_t size) {
  if (current == NULL) return CUDA_ERROR_INVALID_CONTEXT;
  return stand_in_contains(address, size) ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

CUresult CUDAAPI cuInit(unsigned int Flags) {
  return Flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuGetErrorString(CUresult error, const char** pStr) {
  switch (error) {
    case CUDA_ERROR_OUT_OF_MEMORY:
      *pStr = "out of memory";
      break;
    case CUDA_ERROR_INVALID_CONTEXT:
      *pStr = "invalid device context";
      break;
    case CUDA_ERROR_ILLEGAL_ADDRESS:
      *pStr = "an illegal memory access was encountered";
      break;
    default:
      *pStr = NULL;
      return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetCount(int* count) {
  *count = devices;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal < devices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult CUDAAPI cuDeviceGetName(char* name, int len, CUdevice dev) {
  (void)dev;
  strncpy(name, "Stand-in GPU", (size_t)len);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetAttribute(int* pi, CUdevice_attribute attrib, CUdevice dev) {
  (void)dev;
  switch (attrib) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *pi = major_capability;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *pi = minor_capability;
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* pctx, CUdevice dev) {
  (void)dev;
  *pctx = (CUcontext)&context_object;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext ctx) {
  current = ctx;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuStreamCreate(CUstream* phStream, unsigned int Flags) {
  /* Another flag would end the order between this stream and the default one. */
  if (current == NULL || Flags != CU_STREAM_DEFAULT) return CUDA_ERROR_INVALID_VALUE;
  *phStream = (CUstream)&stream_object;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuStreamSynchronize(CUstream hStream) {
  if (current == NULL) return CUDA_ERROR_INVALID_CONTEXT;
  if (hStream != (CUstream)&stream_object) return CUDA_ERROR_INVALID_HANDLE;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < download_count; ++i) {
    memcpy(downloads[i].target, downloads[i].source, downloads[i].size);
  }
  download_count = 0;
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemGetInfo(size_t* free, size_t* total) {
  *total = limit;
  *free = limit - used;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemAlloc(CUdeviceptr* dptr, size_t bytesize) {
  if (current == NULL) return CUDA_ERROR_INVALID_CONTEXT;
  if (bytesize == 0) return CUDA_ERROR_INVALID_VALUE;
  CUresult result = CUDA_ERROR_OUT_OF_MEMORY;
  pthread_mutex_lock(&lock);
  void* begin = NULL;
  if (used + bytesize <= limit && allocation_count < kMaxAllocations &&
      posix_memalign(&begin, kAlignment, bytesize) == 0) {
    memset(begin, 0xff, bytesize);
    allocations[allocation_count++] = (Allocation){begin, bytesize};
    used += bytesize;
    *dptr = (CUdeviceptr)begin;
    result = CUDA_SUCCESS;
  }
  pthread_mutex_unlock(&lock);
  return result;
}

CUresult CUDAAPI cuMemFree(CUdeviceptr dptr) {
  if (current == NULL) return CUDA_ERROR_INVALID_CONTEXT;
  CUresult result = CUDA_ERROR_INVALID_VALUE;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < allocation_count; ++i) {
    if (allocations[i].begin == (unsigned char*)dptr) {
      memset(allocations[i].begin, 0xff, allocations[i].size);
      free(allocations[i].begin);
      used -= allocations[i].size;
      allocations[i] = allocations[--allocation_count];
      result = CUDA_SUCCESS;
      break;
    }
  }
  pthread_mutex_unlock(&lock);
  return result;
}

CUresult CUDAAPI cuMemcpyHtoDAsync(CUdeviceptr dstDevice, const void* srcHost, size_t ByteCount,
                                   CUstream hStream) {
  if (hStream != (CUstream)&stream_object) return CUDA_ERROR_INVALID_HANDLE;
  CUresult result = check(dstDevice, ByteCount);
  if (result == CUDA_SUCCESS) memcpy((void*)dstDevice, srcHost, ByteCount);
  return result;
}

CUresult CUDAAPI cuMemcpyDtoHAsync(void* dstHost, CUdeviceptr srcDevice, size_t ByteCount,
                                   CUstream hStream) {
  if (hStream != (CUstream)&stream_object) return CUDA_ERROR_INVALID_HANDLE;
  CUresult result = check(srcDevice, ByteCount);
  if (result != CUDA_SUCCESS) return result;
  pthread_mutex_lock(&lock);
  if (download_count == kMaxDownloads) {
    result = CUDA_ERROR_INVALID_VALUE;
  } else {
    downloads[download_count++] = (Download){dstHost, (const void*)srcDevice, ByteCount};
  }
  pthread_mutex_unlock(&lock);
  return result;
}

CUresult CUDAAPI cuMemcpy2DUnaligned(const CUDA_MEMCPY2D* pCopy) {
  const CUDA_MEMCPY2D* c = pCopy;
  if (c->srcMemoryType != CU_MEMORYTYPE_DEVICE || c->dstMemoryType != CU_MEMORYTYPE_DEVICE ||
      c->srcXInBytes || c->srcY || c->dstXInBytes || c->dstY || c->srcPitch < c->WidthInBytes ||
      c->dstPitch < c->WidthInBytes) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  for (size_t row = 0; row < c->Height; ++row) {
    CUdeviceptr source = c->srcDevice + row * c->srcPitch;
    CUdeviceptr target = c->dstDevice + row * c->dstPitch;
    CUresult result = check(source, c->WidthInBytes);
    if (result == CUDA_SUCCESS) result = check(target, c->WidthInBytes);
    if (result != CUDA_SUCCESS) return result;
    memcpy((void*)target, (const void*)source, c->WidthInBytes);
  }
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr dstDevice, unsigned char uc, size_t N,
                                 CUstream hStream) {
  if (hStream != (CUstream)&stream_object) return CUDA_ERROR_INVALID_HANDLE;
  CUresult result = check(dstDevice, N);
  if (result == CUDA_SUCCESS) memset((void*)dstDevice, uc, N);
  return result;
}

CUresult CUDAAPI cuStreamDestroy(CUstream hStream) {
  return hStream == (CUstream)&stream_object ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
