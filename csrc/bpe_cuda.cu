#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "bpe_cuda.h"
#include "warp_row.h"

namespace fastclip {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kBlocksPerProcessor = 5;  // 48 registers; without the bound ptxas spills, to fit more

void check(cudaError_t error, const char* action) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string("CUDA cannot ") + action + ": " + cudaGetErrorString(error));
}

// Makes a device the current one for a while.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    check(cudaGetDevice(&before_), "name its current device");
    if (before_ != device_) check(cudaSetDevice(device_), "choose the device");
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }

 private:
  const int device_;
  int before_ = 0;
};

class Memory {
 public:
  ~Memory() {
    for (void* address : addresses_) cudaFree(address);
  }
  template <typename T>
  const T* upload(const T* values, std::size_t count) {
    void* address = nullptr;
    check(cudaMalloc(&address, count * sizeof(T)), "allocate the tokenizer's tables");
    addresses_.push_back(address);
    check(cudaMemcpy(address, values, count * sizeof(T), cudaMemcpyHostToDevice),
          "copy the tokenizer's tables");
    return static_cast<const T*>(address);
  }

 private:
  std::vector<void*> addresses_;
};

// A warp for each text.
template <typename Id>
__global__ void __launch_bounds__(kWarpsPerBlock* kLanes, kBlocksPerProcessor)
    encode_rows(WarpTables tables, CudaBatch batch) {
  __shared__ WarpSpace spaces[kWarpsPerBlock];
  const DeviceWarp warp;
  const unsigned in_block = threadIdx.x / kLanes;
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * kWarpsPerBlock;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * kWarpsPerBlock + in_block;
       i < batch.count; i += stride) {
    const std::int32_t begin = batch.offsets[i], end = batch.offsets[i + 1];
    int length = 0;
    if (begin >= 0 && begin <= end && static_cast<std::size_t>(end) <= batch.size) {
      WarpRow<DeviceWarp> program(warp, spaces[in_block], tables, batch.data + begin, end - begin);
      Id* row = static_cast<Id*>(batch.rows) + i * batch.context_length;
      length = program.encode(row, static_cast<int>(batch.context_length), batch.truncate);
    }
    warp.each([&](int lane) {
      if (lane != 0) return;
      batch.lengths[i] = length;
      if (length == 0) batch.refused[1 + atomicAdd(batch.refused, 1)] = static_cast<int>(i);
    });
  }
}

}  // namespace

int cuda_device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    return 0;
  }
  check(error, "count its devices");
  return count;
}

struct CudaEncoder::State {
  int device;
  Memory memory;
  WarpTables tables;
  int most_blocks;  // that the device runs at once

  template <typename Id>
  void launch(const CudaBatch& batch, cudaStream_t stream) const {
    const std::size_t blocks = (batch.count + kWarpsPerBlock - 1) / kWarpsPerBlock;
    const auto grid = static_cast<unsigned>(std::min<std::size_t>(blocks, most_blocks));
    encode_rows<Id><<<grid, kWarpsPerBlock * kLanes, 0, stream>>>(tables, batch);
    check(cudaGetLastError(), "start the tokenizer");
  }
};

CudaEncoder::CudaEncoder(std::string_view merges, int unicode_version, bool strict, int device)
    : state_(std::make_unique<State>()) {
  const Vocabulary vocabulary(merges);
  const CharacterTables& host = unicode_tables(unicode_version);
  const OnDevice on(device);
  State& state = *state_;
  state.device = device;
  CharacterTables& characters = state.tables.characters;
  characters = host;
  characters.pages = state.memory.upload(host.pages, CharacterTables::kPages);
  characters.property_bits = state.memory.upload(host.property_bits, host.property_count);
  characters.lower_distances = state.memory.upload(host.lower_distances, host.lower_count);
  characters.badness_moves = state.memory.upload(host.badness_moves, host.badness_count);
  state.tables.vocabulary = state.memory.upload(&vocabulary.tables(), 1);
  state.tables.refused = kRefusedProperties | (strict ? std::uint32_t{kUnassigned} : 0);
  // A copy from pageable memory returns before it is done, and torch's streams do not wait for the
  // default one.
  check(cudaStreamSynchronize(nullptr), "copy the tokenizer's tables");
  int per_processor = 0, processors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, encode_rows<std::int32_t>,
                                                      kWarpsPerBlock * kLanes, 0),
        "plan the tokenizer");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "count the device's processors");
  state.most_blocks = std::max(1, per_processor * processors);
}

CudaEncoder::~CudaEncoder() = default;

void CudaEncoder::encode(const CudaBatch& batch, void* stream) const {
  const OnDevice on(state_->device);
  const auto queue = static_cast<cudaStream_t>(stream);
  check(cudaMemsetAsync(batch.refused, 0, sizeof *batch.refused, queue), "clear the refused texts");
  if (batch.count == 0) return;
  switch (batch.id_bytes) {
    case 2:
      return state_->launch<std::uint16_t>(batch, queue);
    case 4:
      return state_->launch<std::int32_t>(batch, queue);
    case 8:
      return state_->launch<std::int64_t>(batch, queue);
    default:
      throw std::runtime_error("ids are of 2, 4 or 8 bytes");
  }
}

}  // namespace fastclip
