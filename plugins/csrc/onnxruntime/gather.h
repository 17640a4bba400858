// The kernel of eoracc::GatherNBits: checks the tensors of a run, and reads the rows in place.

#ifndef EORACC_ONNXRUNTIME_GATHER_H_
#define EORACC_ONNXRUNTIME_GATHER_H_

#include <string.h>

#include "cpu/gather_nbits.h"
#include "cpu/layout.h"
#include "onnxruntime/attributes.h"
#include "onnxruntime/c_api.h"
#include "onnxruntime/tensor.h"
#include "onnxruntime/threads.h"

namespace eoracc::ort {

class GatherKernel : public FromMalloc {
 public:
  GatherKernel(const Api& api, const Attributes& attributes) : api_(api), a_(attributes) {}

  Status* compute(KernelContext* context) const {
    Tensor inputs[kGatherInputs];
    size_t input_count = 0;
    RETURN_IF_FAILED(api_.input_count(context, &input_count));
    for (size_t i = 0; i < input_count && i < kGatherInputs; ++i) {
      const Value* value = nullptr;
      RETURN_IF_FAILED(api_.input(context, i, &value));
      RETURN_IF_FAILED(read_tensor(api_, value, kGatherInputNames[i], &inputs[i]));
    }
    int64_t table_rows = 0;
    RETURN_IF_FAILED(check_table(inputs, &table_rows));

    const Tensor& indices = inputs[kGatherIndices];
    int64_t shape[kMaxRank + 1];
    int64_t count = 1;
    for (size_t i = 0; i < indices.rank; ++i) count *= shape[i] = indices.shape[i];
    shape[indices.rank] = a_.k;
    Value* output = nullptr;
    RETURN_IF_FAILED(api_.output(context, 0, shape, indices.rank + 1, &output));
    if (count == 0) return nullptr;
    Memory memory;
    int64_t* rows = static_cast<int64_t*>(memory.take((size_t)count * sizeof(int64_t)));
    if (rows == nullptr) return out_of_memory(api_);
    RETURN_IF_FAILED(read_rows(indices, count, table_rows, rows));
    void* values = nullptr;
    RETURN_IF_FAILED(api_.tensor_data(output, &values));
    return gather(context, describe(inputs), rows, count, static_cast<float*>(values));
  }

 private:
  // ---- checks

  // B, scales and zero points fit one another; `rows` becomes the rows that they have, without N
  // those that pad the last tile included.
  Status* check_table(const Tensor* inputs, int64_t* rows) const {
    const Tensor &codes = inputs[kGatherB], &scales = inputs[kGatherScales];
    const int64_t first = codes.rank > 0 ? codes.shape[0] : 0;
    *rows = a_.tiled ? first * kTile : first;
    if (a_.n > *rows) {
      return error(api_, "B must have N = %lld rows, not %lld", (long long)a_.n, (long long)*rows);
    }
    if (a_.n > 0) *rows = a_.n;
    if (a_.tiled) {
      const int64_t chunk = chunk_bytes(a_.bits);
      const int64_t bytes = (int64_t)eoracc_tile_bytes(a_.k, (int32_t)a_.bits);
      RETURN_IF_FAILED(require(inputs, kGatherB, {first, bytes / chunk, chunk}, 3));
    } else {
      const int64_t bytes = a_.block_size * a_.bits / 8;
      RETURN_IF_FAILED(require(inputs, kGatherB, {first, a_.groups(), bytes}, 3));
    }
    RETURN_IF_FAILED(require_per_group(inputs, kGatherScales, first));
    if (!is_float(scales.type)) return error(api_, "scales must be float or float16");
    if (!inputs[kGatherZeroPoints].present) return nullptr;
    return require_per_group(inputs, kGatherZeroPoints, first);
  }

  Status* require_per_group(const Tensor* inputs, GatherInput index, int64_t first) const {
    return require(inputs, index, {first, a_.groups(), kTile}, a_.tiled ? 3 : 2);
  }

  struct Shape {
    int64_t sizes[3];
  };

  Status* require(const Tensor* inputs, GatherInput index, Shape expected, size_t rank) const {
    const Tensor& tensor = inputs[index];
    bool fits = tensor.present && tensor.rank == rank;
    for (size_t i = 0; fits && i < rank; ++i) fits = tensor.shape[i] == expected.sizes[i];
    if (fits) return nullptr;
    char last[32] = "";
    if (rank == 3) snprintf(last, sizeof last, ", %lld", (long long)expected.sizes[2]);
    return error(api_, "%s must have the shape [%lld, %lld%s]", kGatherInputNames[index],
                 (long long)expected.sizes[0], (long long)expected.sizes[1], last);
  }

  // The row of each index. As in ONNX, a negative one counts from the end; tiles without N do not
  // tell where a table ends, since their last rows may be padding.
  Status* read_rows(const Tensor& indices, int64_t count, int64_t table_rows, int64_t* rows) const {
    memcpy(rows, indices.data, (size_t)count * sizeof(int64_t));
    const int64_t least = a_.tiled && a_.n == 0 ? 0 : -table_rows;
    for (int64_t i = 0; i < count; ++i) {
      if (rows[i] < least || rows[i] >= table_rows) {
        return error(api_, "indices must be at least %lld and below the %lld rows of B, not %lld",
                     (long long)least, (long long)table_rows, (long long)rows[i]);
      }
      if (rows[i] < 0) rows[i] += table_rows;
    }
    return nullptr;
  }

  // ---- the call

  Table describe(const Tensor* inputs) const {
    Table table{};
    table.columns = a_.k;
    table.group_size = a_.block_size;
    table.bits = (int32_t)a_.bits;
    table.scales_type = kernel_type(inputs[kGatherScales].type);
    table.tiled = a_.tiled;
    table.codes = static_cast<const uint8_t*>(inputs[kGatherB].data);
    table.scales = inputs[kGatherScales].data;
    table.zero_points = static_cast<const uint8_t*>(inputs[kGatherZeroPoints].data);
    return table;
  }

  // Rows that one thread reads: a task has at least 16384 values, or starting it costs more.
  struct Task {
    const Table& table;
    const int64_t* rows;
    int64_t count;
    int64_t rows_each;
    float* values;

    static void run(void* data, size_t index) {
      const Task& task = *static_cast<const Task*>(data);
      const int64_t first = (int64_t)index * task.rows_each, left = task.count - first;
      gather_rows(task.table, task.rows + first, left < task.rows_each ? left : task.rows_each,
                  task.values + first * task.table.columns);
    }
  };

  Status* gather(const KernelContext* context, const Table& table, const int64_t* rows,
                 int64_t count, float* values) const {
    Task task{table, rows, count, ceil_div(16384, a_.k), values};
    const size_t tasks = (size_t)ceil_div(count, task.rows_each);
    if (tasks == 1) {
      Task::run(&task, 0);
      return nullptr;
    }
    return api_.parallel_for(context, Task::run, tasks, 0, &task);
  }

  Api api_;
  Attributes a_;
};

}  // namespace eoracc::ort

#endif  // EORACC_ONNXRUNTIME_GATHER_H_
