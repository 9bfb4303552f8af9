#include "batch.h"

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <thread>
#include <utility>

namespace fastclip {
namespace {

constexpr std::size_t kChunk =
    256;  // rows handed to a thread at a time; a smaller batch stays on one

template <typename Id>
void write_row(Id* row, std::size_t context_length, const std::uint16_t* ids, std::size_t count) {
  row[0] = kStartOfText;
  for (std::size_t i = 0; i < count; ++i) row[1 + i] = ids[i];
  row[1 + count] = kEndOfText;
  std::memset(row + count + 2, 0, (context_length - count - 2) * sizeof(Id));
}

}  // namespace

// Threads that wait for work. One batch at a time; who finds it busy works alone.
class Pool {
 public:
  explicit Pool(unsigned helpers) {
    for (unsigned i = 0; i < helpers; ++i) threads_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // Run `work` on this thread and on `helpers` others; returns when all are done with it.
  void run(unsigned helpers, const std::function<void()>& work) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) {
      work();
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      wanted_ = std::min<unsigned>(helpers, static_cast<unsigned>(threads_.size()));
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // whoever has not begun finds nothing left to do
    done_.wait(lock, [this] { return working_ == 0; });
    work_ = nullptr;
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return stopping_ || wanted_ > 0; });
      if (stopping_) return;
      --wanted_;
      ++working_;
      const std::function<void()>* work = work_;
      lock.unlock();
      (*work)();
      lock.lock();
      if (--working_ == 0) done_.notify_all();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void()>* work_ = nullptr;
  unsigned wanted_ = 0, working_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

// Whatever a thread may hold a lock of: replaced as a whole in a forked child, where those threads
// do not exist.
struct BatchEncoder::State {
  std::mutex mutex;
  std::vector<std::unique_ptr<Encoder>> idle;
  std::unique_ptr<Pool> pool;
};

BatchEncoder::BatchEncoder(std::shared_ptr<const Vocabulary> vocabulary,
                           const UnicodeTables& tables, Dialect dialect, AsciiScan scan,
                           unsigned threads)
    : vocabulary_(std::move(vocabulary)),
      tables_(tables),
      dialect_(std::move(dialect)),
      scan_(scan),
      threads_(std::max(1u, threads)),
      state_(new State),
      process_(getpid()) {}

BatchEncoder::~BatchEncoder() {
  if (process_ == getpid()) delete state_.load();  // elsewhere its threads cannot be joined
}

BatchEncoder::State& BatchEncoder::state() {
  if (process_ != getpid()) {
    // A fork may have happened while another thread held a lock: what was there is given up, not
    // freed. If two threads come here at once, both states serve.
    state_ = new State;
    process_ = getpid();
  }
  return *state_;
}

std::unique_ptr<Encoder> BatchEncoder::take(State& state) {
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    if (!state.idle.empty()) {
      std::unique_ptr<Encoder> encoder = std::move(state.idle.back());
      state.idle.pop_back();
      return encoder;
    }
  }
  return std::make_unique<Encoder>(*vocabulary_, tables_, dialect_, scan_);
}

void BatchEncoder::give(State& state, std::unique_ptr<Encoder> encoder) {
  encoder->shrink();
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (state.idle.size() < threads_) state.idle.push_back(std::move(encoder));
}

void BatchEncoder::with_encoder(const std::function<void(Encoder&)>& use) {
  State& here = state();
  std::unique_ptr<Encoder> encoder = take(here);
  use(*encoder);
  give(here, std::move(encoder));
}

bool BatchEncoder::encode_cleaned(const TextView& text, std::size_t index, bool truncate,
                                  const Rows& rows, std::size_t* tokens) {
  bool written = false;
  with_encoder([&](Encoder& encoder) {
    encoder.encode_cleaned(text, truncate ? rows.context_length - 2 : SIZE_MAX);
    written = write_ids(encoder.ids(), encoder.count(), index, truncate, rows, tokens);
  });
  return written;
}

bool BatchEncoder::write_ids(const std::uint16_t* ids, std::size_t count, std::size_t index,
                             bool truncate, const Rows& rows, std::size_t* tokens) {
  const std::size_t room = rows.context_length - 2;
  *tokens = count + 2;
  if (count > room && !truncate) return false;
  count = std::min(count, room);
  const std::size_t start = index * rows.context_length;
  switch (rows.id_bytes) {
    case 2:
      write_row(static_cast<std::uint16_t*>(rows.data) + start, rows.context_length, ids, count);
      break;
    case 4:
      write_row(static_cast<std::int32_t*>(rows.data) + start, rows.context_length, ids, count);
      break;
    default:
      write_row(static_cast<std::int64_t*>(rows.data) + start, rows.context_length, ids, count);
  }
  if (rows.lengths != nullptr) rows.lengths[index] = static_cast<std::int32_t>(count + 2);
  return true;
}

void BatchEncoder::encode_range(Encoder& encoder, const TextView* texts, std::size_t begin,
                                std::size_t end, bool truncate, const Rows& rows,
                                std::vector<Unwritten>& unwritten) const {
  using Reason = Unwritten::Reason;
  const std::size_t limit = truncate ? rows.context_length - 2 : SIZE_MAX;
  std::vector<AsciiSearch>& group = encoder.group();
  for (; begin < end; begin += group.size()) {
    const std::size_t size = std::min(group.size(), end - begin);
    std::uint32_t plain = 0;
    for (std::size_t k = 0; k < size; ++k) {
      if (encoder.begin(texts[begin + k], group[k])) plain |= 1u << k;
    }
    for (std::size_t k = 0; k < size; ++k) {
      if (plain >> k & 1) encoder.look_ahead(group[k].words);
    }
    for (std::size_t k = 0; k < size; ++k) {
      const std::size_t i = begin + k;
      Outcome outcome = Outcome::kEncoded;
      if (plain >> k & 1) {
        encoder.finish(group[k], limit);
      } else {
        outcome = encoder.encode(texts[i], limit);
      }
      std::size_t tokens = 0;
      switch (outcome) {
        case Outcome::kEncoded:
          if (!write_ids(encoder.ids(), encoder.count(), i, truncate, rows, &tokens)) {
            unwritten.push_back({i, Reason::kTooLong, tokens});
          }
          break;
        case Outcome::kMojibake:
          unwritten.push_back({i, Reason::kMojibake, 0});
          break;
        case Outcome::kUnassigned:
          unwritten.push_back({i, Reason::kUnassigned, 0});
          break;
        case Outcome::kNotUtf8:
          unwritten.push_back({i, Reason::kNotUtf8, encoder.bad_byte()});
          break;
      }
    }
  }
}

std::vector<Unwritten> BatchEncoder::encode(const TextView* texts, std::size_t count, bool truncate,
                                            const Rows& rows) {
  State& here = state();
  std::vector<Unwritten> all;
  if (threads_ == 1 || count <= kChunk) {
    std::unique_ptr<Encoder> encoder = take(here);
    encode_range(*encoder, texts, 0, count, truncate, rows, all);
    give(here, std::move(encoder));
    return all;
  }
  Pool* pool = nullptr;
  {
    const std::lock_guard<std::mutex> lock(here.mutex);
    if (here.pool == nullptr) here.pool = std::make_unique<Pool>(threads_ - 1);
    pool = here.pool.get();
  }
  std::atomic<std::size_t> next{0};
  std::mutex merging;
  std::exception_ptr failure;
  const std::size_t chunks = (count + kChunk - 1) / kChunk;
  pool->run(static_cast<unsigned>(std::min<std::size_t>(threads_, chunks) - 1), [&] {
    try {
      std::size_t chunk = next.fetch_add(1);
      if (chunk >= chunks) return;
      std::unique_ptr<Encoder> encoder = take(here);
      std::vector<Unwritten> own;
      for (; chunk < chunks; chunk = next.fetch_add(1)) {
        const std::size_t begin = chunk * kChunk;
        encode_range(*encoder, texts, begin, std::min(begin + kChunk, count), truncate, rows, own);
      }
      give(here, std::move(encoder));
      const std::lock_guard<std::mutex> lock(merging);
      all.insert(all.end(), own.begin(), own.end());
    } catch (...) {  // no memory: for the caller to know, not for a helper to die of
      const std::lock_guard<std::mutex> lock(merging);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
  std::sort(all.begin(), all.end(),
            [](const Unwritten& a, const Unwritten& b) { return a.index < b.index; });
  return all;
}

}  // namespace fastclip
