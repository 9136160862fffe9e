// Rounds of greedy rows on a CPU, each in one parallel region: what rounds.py does, in place of some hundred operations
// of PyTorch. Each row brings only the tokens it needs, and nothing is computed after the end of a reply.
#pragma once

#include <utility>

#include "cpu_kernels.h"

namespace vita_audio {

template <class T>
struct Model {
  Address embedding;                // (vocabulary, d)
  Stack<T> backbone;
  std::vector<Head<T>> heads;
  Product<T> lm_head, speech_head;  // speech_head: the ids from `begin` on
  Index begin, end;                 // the markers of speech
  Shape<T> shape;
  std::vector<Address> caches;      // of the layers, then of the heads
};

// Where rows stand, and the options of their requests, as in state.py and rounds.py.
struct Rows {
  Index tokens_stride, report_stride, num_heads, places;
  Index *tokens, *known, *seen, *seen_heads, *drafts, *starts, *backbone_steps, *head_steps, *report;
  Address hidden;
  const bool *lossless, *between, *heads_speak, *check;

  Index* tokens_of(Index row) const { return tokens + row * tokens_stride; }
  Index& seen_head(Index row, Index head) const { return seen_heads[row * num_heads + head]; }
};

// Choices among the rows of speech that no full projection has checked yet.
struct Checks {
  Index steps, burst;
  Address hidden;          // (rows, steps, d)
  Index* tokens;           // (rows, steps), -1: nothing to check
  Index* disagreements;    // (rows,)
};

// Where a row's reply ends: after so many tokens, or with one of some ids.
using End = std::pair<Index, std::vector<Index>>;

template <class T>
class Rounds {
 public:
  Rounds(Model<T> model, Rows rows) : model_(std::move(model)), rows_(rows), d_(model_.lm_head.in) {}

  // A round of the rows first … last - 1, whose replies end as `ends` say. prompt: inputs (tokens, d) of the only row's
  // first pass; null: embeddings. checks: null if no row wants any.
  void run(Index first, Index last, Address prompt, const std::vector<End>& ends, const Checks* checks, int threads) {
    checks_ = checks, first_ = first, last_ = last;
    backbone_steps_.assign(rows_.backbone_steps + first, rows_.backbone_steps + last);
    head_steps_.assign(rows_.head_steps + first, rows_.head_steps + last);
    for (Index row = first; row < last; ++row) rows_.starts[row] = rows_.known[row] - rows_.drafts[row];
    Index passes = most(backbone_steps_), head_passes = 0;
#pragma omp parallel num_threads(threads)
    {
      for (Index step = 0; step < passes; ++step) {
#pragma omp single
        start_pass(step, step ? 0 : prompt);
        vita_audio::run(model_.backbone, model_.caches.data(), model_.shape, window_, buffers_, states_.data());
#pragma omp single
        ask_for_tokens(step);
        choose();
#pragma omp single
        passes = take_tokens(step, ends);
      }
#pragma omp single
      head_passes = start_heads();
      for (Index head = 0; head < head_passes; ++head) {
#pragma omp single
        keep_rows(head);
        vita_audio::run(model_.heads[head], model_.caches[model_.backbone.layers.size() + head],
                        pointer<T>(model_.embedding), rows_.tokens, rows_.tokens_stride, head + 1, model_.shape, window_,
                        buffers_, fused_, states_.data());
#pragma omp single
        ask_for_drafts();
        choose();
#pragma omp single
        head_passes = take_drafts(head, ends);
      }
#pragma omp single
      settle();
    }
  }

 private:
  // A state from which a token is to be chosen.
  struct Asked {
    Index row;
    bool speech;  // among the ids of speech
    Index check;  // index of a choice to check; -1: none
  };
  struct Best {
    Index id;
    float logit;
  };

  void fit(Index tokens) {
    states_.resize(tokens * d_), fused_.resize(tokens * 2 * d_);
    buffers_.fit(model_.backbone.layers[0], tokens);
  }

  static Index most(const std::vector<Index>& steps) { return *std::max_element(steps.begin(), steps.end()); }

  void start_pass(Index step, Address prompt) {
    found_.resize(omp_get_num_threads());
    window_.clear();
    for (Index row = first_; row < last_; ++row)
      if (backbone_steps_[row - first_] > step) window_.add_row(row, rows_.seen[row], rows_.known[row]);
    fit(window_.tokens());
    if (prompt) {
      std::copy_n(pointer<T>(prompt), buffers_.x.size(), buffers_.x.data());
      return;
    }
    for (Index i = 0; i < window_.tokens(); ++i) {
      const Index id = rows_.tokens_of(window_.rows[i])[window_.positions[i]];
      std::copy_n(pointer<T>(model_.embedding) + id * d_, d_, buffers_.x.data() + i * d_);
    }
  }

  // Stores the backbone's output, and asks for the token after the last verified one and after each draft.
  void ask_for_tokens(Index step) {
    asked_.clear(), wanted_.clear();
    bool full = false;
    for (const Span& span : window_.spans) {
      T* kept = pointer<T>(rows_.hidden) + (span.row * rows_.places + rows_.seen[span.row]) * d_;
      std::copy_n(states_.data() + span.begin * d_, span.count * d_, kept);
      const Index drafts = step ? 0 : rows_.drafts[span.row];
      const bool speech = !rows_.lossless[span.row] && rows_.between[span.row] && in_speech(span.row);
      full |= !speech;
      for (Index i = span.last() - drafts; i <= span.last(); ++i) ask(span.row, i, speech);
    }
    if (checks_ && full && !step) ask_checks();
  }

  void ask_for_drafts() {
    asked_.clear(), wanted_.clear();
    for (const Span& span : window_.spans)
      ask(span.row, span.last(), rows_.heads_speak[span.row] || (rows_.between[span.row] && in_speech(span.row)));
  }

  bool in_speech(Index row) const {
    const Index last = rows_.tokens_of(row)[rows_.known[row] - 1];
    return last >= model_.begin && last != model_.end;
  }

  void ask(Index row, Index token, bool speech) {
    asked_.push_back({row, speech, -1});
    const T* state = states_.data() + token * d_;
    wanted_.insert(wanted_.end(), state, state + d_);
  }

  // All rows of the vocabulary are read anyway, so a few more states cost almost nothing.
  void ask_checks() {
    std::vector<Index> rows;
    for (const Span& span : window_.spans) rows.push_back(span.row);
    for (const Index row : rows)
      for (Index i = row * checks_->steps; i < (row + 1) * checks_->steps; ++i)
        if (checks_->tokens[i] >= 0) {
          asked_.push_back({row, false, i});
          const T* state = pointer<T>(checks_->hidden) + i * d_;
          wanted_.insert(wanted_.end(), state, state + d_);
        }
  }

  // This thread's part of finding the first of the highest logits of each state asked for.
  void choose() {
    const bool speech = std::all_of(asked_.begin(), asked_.end(), [](const Asked& each) { return each.speech; });
    std::vector<Best>& found = found_[omp_get_thread_num()];
    found.assign(asked_.size(), {-1, 0});
    const Index shift = speech ? model_.begin : 0;
    multiply_blocks(speech ? model_.speech_head : model_.lm_head, wanted_.data(), asked_.size(),
                    [&](Index row, Index first, Index width, const float* logits) {
                      const Index from = asked_[row].speech ? std::max<Index>(model_.begin - shift - first, 0) : 0;
                      if (from >= width) return;
                      const float highest = widen(narrow<T>(*std::max_element(logits + from, logits + width)));
                      if (found[row].id >= 0 && highest <= found[row].logit) return;
                      for (Index i = from; i < width; ++i)
                        if (widen(narrow<T>(logits[i])) == highest) {
                          found[row] = {shift + first + i, highest};
                          return;
                        }
                    });
#pragma omp barrier
  }

  // The id chosen for a state. Threads have ids in ascending order, so of equal logits the first counts.
  Index best(Index index) const {
    Best best = found_[0][index];
    for (const std::vector<Best>& found : found_)
      if (found[index].id >= 0 && (best.id < 0 || found[index].logit > best.logit)) best = found[index];
    if (best.id >= 0) return best.id;
    return asked_[index].speech ? model_.begin : 0;  // every logit is NaN
  }

  // Verifies drafts and appends the token that follows those accepted. Returns the number of backbone passes in this
  // round. A reply that has ended takes no more.
  Index take_tokens(Index step, const std::vector<End>& ends) {
    for (Index i = 0; i < Index(asked_.size()); ++i) {
      const Index check = asked_[i].check;
      if (check < 0) continue;
      checks_->disagreements[asked_[i].row] += best(i) != checks_->tokens[check];
      checks_->tokens[check] = -1;
    }
    Index at = 0;
    for (const Span& span : window_.spans) {
      const Index row = span.row, drafts = step ? 0 : rows_.drafts[row], *tokens = rows_.tokens_of(row);
      Index known = rows_.known[row] - drafts, accepted = 0;
      while (accepted < drafts && best(at + accepted) == tokens[known]) ++accepted, ++known;
      rows_.known[row] = rows_.seen[row] = known;
      // What heads computed from rejected drafts is forgotten. Head k reads k + 1 tokens ahead.
      for (Index head = 0; head < rows_.num_heads; ++head)
        rows_.seen_head(row, head) = std::min(rows_.seen_head(row, head), std::max<Index>(known - 1 - head, 0));
      append(row, at + accepted, step);
      at += drafts + 1;
      if (ends_reply(row, ends)) backbone_steps_[row - first_] = 0;
      if (ends_drafts(row, ends)) head_steps_[row - first_] = 0;
    }
    return most(backbone_steps_);
  }

  // Appends what a head chose. Returns the number of heads that run in this round.
  Index take_drafts(Index head, const std::vector<End>& ends) {
    for (size_t i = 0; i < asked_.size(); ++i) {
      const Index row = asked_[i].row;
      append(row, i, checks_ ? checks_->burst + head : 0);
      if (ends_drafts(row, ends)) head_steps_[row - first_] = head + 1;
    }
    return most(head_steps_);
  }

  // The choice of a state is its row's next token. slot: where it waits to be checked.
  void append(Index row, Index index, Index slot) {
    const Index id = best(index);
    rows_.tokens_of(row)[rows_.known[row]++] = id;
    if (checks_ && rows_.check[row] && asked_[index].speech) {
      const Index i = row * checks_->steps + slot;
      std::copy_n(wanted_.data() + index * d_, d_, pointer<T>(checks_->hidden) + i * d_);
      checks_->tokens[i] = id;
    }
  }

  // The window of the heads: in each row, what the backbone has computed and the row's last head has not.
  Index start_heads() {
    window_.clear();
    for (Index row = first_; row < last_; ++row)
      if (const Index steps = head_steps_[row - first_])
        window_.add_row(row, rows_.seen_head(row, steps - 1), rows_.seen[row]);
    fit(window_.tokens());
    for (Index i = 0; i < window_.tokens(); ++i) {
      const Index place = window_.rows[i] * rows_.places + window_.positions[i];
      std::copy_n(pointer<T>(rows_.hidden) + place * d_, d_, states_.data() + i * d_);
    }
    return most(head_steps_);
  }

  // Whether a row's reply ends with its last token. spare: tokens that are not there yet, but count.
  bool ends_reply(Index row, const std::vector<End>& ends, Index spare = 0) const {
    const auto& [left, stops] = ends[row - first_];
    const Index *first = rows_.tokens_of(row) + rows_.starts[row], *last = rows_.tokens_of(row) + rows_.known[row];
    return last - first + spare >= left || std::find_first_of(first, last, stops.begin(), stops.end()) != last;
  }

  // Whether no head need go on. The pass that verifies drafts makes a token of its own.
  bool ends_drafts(Index row, const std::vector<End>& ends) const { return ends_reply(row, ends, rows_.lossless[row]); }

  // Drops the rows that use `head` heads or fewer from the window.
  void keep_rows(Index head) {
    const auto stays = [&](const Span& span) { return head_steps_[span.row - first_] > head; };
    if (std::all_of(window_.spans.begin(), window_.spans.end(), stays)) return;
    Window kept;
    for (const Span& span : window_.spans) {
      if (!stays(span)) continue;
      std::copy_n(states_.data() + span.begin * d_, span.count * d_, states_.data() + kept.tokens() * d_);
      const Index position = window_.positions[span.begin];
      kept.add_row(span.row, position, position + span.count);
    }
    window_ = kept;
    fit(window_.tokens());
  }

  // Updates the lengths of the heads that ran and the number of drafts, and writes the report.
  void settle() {
    for (Index row = first_; row < last_; ++row) {
      const Index steps = head_steps_[row - first_];
      for (Index head = 0; head < steps; ++head) rows_.seen_head(row, head) = rows_.seen[row];
      rows_.drafts[row] = rows_.lossless[row] ? steps : 0;
      Index* report = rows_.report + row * rows_.report_stride;
      *report++ = rows_.known[row] - rows_.drafts[row];
      *report++ = rows_.drafts[row];
      *report++ = rows_.seen[row];
      for (Index head = 0; head < rows_.num_heads; ++head) *report++ = rows_.seen_head(row, head);
      std::copy_n(rows_.tokens_of(row) + rows_.starts[row], rows_.known[row] - rows_.drafts[row] - rows_.starts[row], report);
    }
  }

  Model<T> model_;
  Rows rows_;
  Index d_;
  const Checks* checks_ = nullptr;
  Index first_ = 0, last_ = 0;              // rows of the round
  Window window_;
  Buffers<T> buffers_;
  std::vector<T> states_, fused_, wanted_;  // (tokens, d), (tokens, 2 d), (asked for, d)
  std::vector<Asked> asked_;
  std::vector<std::vector<Best>> found_;    // of each thread
  std::vector<Index> backbone_steps_, head_steps_;  // of each row, up to the end of its reply
};

}  // namespace vita_audio
