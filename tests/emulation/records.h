// How a test talks to an emulation program: records on standard input, each a list of integers, a
// list of doubles and a list of byte buffers; the resulting buffers on standard output. The Python
// side is tests/emulation/emulator.py.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace voxfuse::emulation {

/// Memory of exactly the size asked for, filled with NaN, so that AddressSanitizer sees an access
/// beyond its end and a value that was never written shows. Aligned to 16 bytes, no more.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t size)
      : data_(new unsigned char[static_cast<std::size_t>(size)]), size_(size) {
    std::memset(data_.get(), 0xff, static_cast<std::size_t>(size));
  }

  unsigned char* get() const { return data_.get(); }
  std::int64_t size() const { return size_; }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  std::unique_ptr<unsigned char[]> data_;
  std::int64_t size_ = 0;
};

struct Record {
  std::vector<std::int64_t> integers;
  std::vector<double> doubles;
  std::vector<Buffer> buffers;
};

/// Reads the next record from standard input; false at its end.
inline bool read(Record& record) {
  const auto get = [](void* destination, std::size_t bytes) {
    if (bytes > 0 && std::fread(destination, bytes, 1, stdin) != 1) {
      std::fprintf(stderr, "a record ends too early\n");
      std::exit(2);
    }
  };
  std::int64_t sizes[3];
  if (std::fread(sizes, sizeof(sizes), 1, stdin) != 1) return false;
  record.integers.resize(static_cast<std::size_t>(sizes[0]));
  record.doubles.resize(static_cast<std::size_t>(sizes[1]));
  record.buffers.resize(static_cast<std::size_t>(sizes[2]));
  get(record.integers.data(), record.integers.size() * sizeof(std::int64_t));
  get(record.doubles.data(), record.doubles.size() * sizeof(double));
  for (Buffer& buffer : record.buffers) {
    std::int64_t size = 0;
    get(&size, sizeof(size));
    buffer = Buffer(size);
    get(buffer.get(), static_cast<std::size_t>(size));
  }
  return true;
}

/// Writes the results of a record to standard output.
inline void write(const std::vector<const Buffer*>& buffers) {
  for (const Buffer* buffer : buffers) {
    const std::int64_t size = buffer->size();
    std::fwrite(&size, sizeof(size), 1, stdout);
    std::fwrite(buffer->get(), 1, static_cast<std::size_t>(size), stdout);
  }
  std::fflush(stdout);
}

}  // namespace voxfuse::emulation
