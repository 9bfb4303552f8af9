// A sample's members out of its shard, in one call and without a copy.
#include <pybind11/pybind11.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

#include "data_bindings.h"

namespace py = pybind11;

namespace fastclip {
namespace {

constexpr int kMembers = 3;
constexpr std::int64_t kBlock = 512;     // a tar's header
constexpr std::int64_t kGap = 16 * 512;  // bytes between members that are read, not skipped
constexpr std::int64_t kFarthest = std::int64_t{1} << 60;
constexpr std::int64_t kLarge = 1 << 24;  // from here on a size is compared with the file's first
constexpr std::size_t kSizeField = 124, kSizeBytes = 12;

enum Fault { kNone, kShort, kChanged };

struct Member {
  int number;
  std::int64_t offset, size;
  char* content;
  std::array<char, kBlock> header;
};

// What an octal field says, or GNU's base 256; -1 for neither.
std::int64_t number_in(const char* field) {
  if (static_cast<unsigned char>(field[0]) & 0x80) {
    std::uint64_t value = 0;
    for (std::size_t i = kSizeBytes - 8; i < kSizeBytes; ++i)
      value = value << 8 | static_cast<unsigned char>(field[i]);
    return static_cast<std::int64_t>(value);
  }
  std::int64_t value = 0;
  std::size_t i = 0;
  while (i < kSizeBytes && (field[i] == ' ' || field[i] == '\0')) ++i;
  for (; i < kSizeBytes && field[i] != ' ' && field[i] != '\0'; ++i) {
    if (field[i] < '0' || field[i] > '7') return -1;
    value = value << 3 | (field[i] - '0');
  }
  return value;
}

// Fills the parts from `offset` on; 0, kShort, or an error number below zero.
int fill(int descriptor, iovec* parts, int count, std::int64_t offset) {
  while (count > 0) {
    const ssize_t read = preadv(descriptor, parts, count, offset);
    if (read < 0 && errno == EINTR) continue;
    if (read < 0) return -errno;
    if (read == 0) return kShort;
    offset += read;
    auto rest = static_cast<std::size_t>(read);
    while (count > 0 && rest >= parts->iov_len) {
      rest -= parts->iov_len;
      ++parts;
      --count;
    }
    if (count > 0) {
      parts->iov_base = static_cast<char*>(parts->iov_base) + rest;
      parts->iov_len -= rest;
    }
  }
  return kNone;
}

int read_all(int descriptor, Member* members, int count) {
  std::array<char, kGap> skipped;  // its content is of no interest
  std::array<iovec, 3 * kMembers> parts;
  int used = 0;
  std::int64_t begin = 0, end = 0;
  for (int i = 0; i < count; ++i) {
    Member& member = members[i];
    const std::int64_t gap = member.offset - kBlock - end;
    if (used > 0 && (gap < 0 || gap > kGap)) {
      if (const int fault = fill(descriptor, parts.data(), used, begin)) return fault;
      used = 0;
    }
    if (used == 0) begin = member.offset - kBlock;
    if (used > 0 && gap > 0) parts[used++] = {skipped.data(), static_cast<std::size_t>(gap)};
    parts[used++] = {member.header.data(), kBlock};
    if (member.size > 0) parts[used++] = {member.content, static_cast<std::size_t>(member.size)};
    end = member.offset + member.size;
  }
  return fill(descriptor, parts.data(), used, begin);
}

// The three members as bytes, b"" for an offset of -1; or the fault's number.
py::object read_members(int descriptor, const py::tuple& places) {
  if (places.size() != kMembers) throw py::value_error("there are three places");
  std::array<Member, kMembers> members;
  std::array<py::object, kMembers> contents{py::bytes(), py::bytes(), py::bytes()};
  int count = 0;
  for (int i = 0; i < kMembers; ++i) {
    const auto place = places[i].cast<py::tuple>();
    if (place.size() != 2) throw py::value_error("a place is an offset and a size");
    const std::int64_t offset = place[0].cast<std::int64_t>(), size = place[1].cast<std::int64_t>();
    if (offset < 0) continue;
    if (size < 0 || offset < kBlock || offset > kFarthest)
      return py::int_(static_cast<int>(kShort));
    if (size >= kLarge) {
      struct stat status;
      if (fstat(descriptor, &status) != 0 || size > status.st_size)
        return py::int_(static_cast<int>(kShort));
    }
    PyObject* content = PyBytes_FromStringAndSize(nullptr, size);
    if (content == nullptr) throw py::error_already_set();
    contents[i] = py::reinterpret_steal<py::bytes>(content);
    Member& member = members[count++];
    member.number = i;
    member.offset = offset;
    member.size = size;
    member.content = PyBytes_AS_STRING(content);
  }
  for (int i = 1; i < count; ++i)
    for (int j = i; j > 0 && members[j].offset < members[j - 1].offset; --j)
      std::swap(members[j], members[j - 1]);
  int fault;
  {
    py::gil_scoped_release release;
    fault = count > 0 ? read_all(descriptor, members.data(), count) : kNone;
  }
  if (fault < 0) {
    errno = -fault;
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
  for (int i = 0; i < count && fault == kNone; ++i)
    if (number_in(members[i].header.data() + kSizeField) != members[i].size) fault = kChanged;
  if (fault != kNone) return py::int_(fault);
  return py::make_tuple(contents[0], contents[1], contents[2]);
}

}  // namespace

void bind_members(py::module_& module) {
  module.def("read_members", &read_members, py::arg("descriptor"), py::arg("places"));
}

}  // namespace fastclip
