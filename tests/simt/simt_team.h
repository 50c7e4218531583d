// Blocks that are resident together, and what they store for one another. Such a store arrives at
// any later time: with the other stores in turn (seed 0), or after a drawn number of rounds.
#pragma once

namespace simt {

class Team {
 public:
  Team(const Config& c, int first, std::mt19937& random)
      : random_(random()), shuffled_(c.seed != 0) {
    for (int i = first; i < first + c.together; ++i)
      blocks_.push_back(std::make_unique<Block>(c, i, random(), this));
  }

  template <class Body>
  void run(const Body& body) {
    static std::vector<std::unique_ptr<char[]>> stacks;  // kept between teams
    for (size_t i = 0; i < blocks_.size(); ++i)
      blocks_[i]->start(body, stacks, i * blocks_[i]->config.threads);
    std::vector<Block*> order;
    for (const auto& block : blocks_) order.push_back(block.get());
    for (int idle = 0; idle < 2 && !ended();) {
      if (shuffled_) std::shuffle(order.begin(), order.end(), random_);
      bool moved = open_barrier();
      for (Block* block : order) {
        // Blocks now and then stand still, long enough for the others to get ahead if they can.
        if (shuffled_ && idle == 0 && (block->resting > 0 || random_() % 16 == 0)) {
          block->resting = block->resting > 0 ? block->resting - 1 : int(random_() % 64);
          moved = true;
          continue;
        }
        moved = block->step() || moved;
        if (!block->error.empty()) throw std::runtime_error(block->error);
      }
      moved = deliver(!moved) || moved;
      idle = moved ? 0 : idle + 1;
    }
    Block::running() = nullptr;
    if (!ended()) throw std::runtime_error(whereabouts());
  }

  // A word of global memory, which other blocks see later. To one word the stores keep their order.
  void store_word(uint64_t* to, uint64_t value) {
    stores_.push_back({nullptr, reinterpret_cast<char*>(to), 8, {}, 0});
    memcpy(stores_.back().value, &value, 8);
  }

  // Into the shared memory of block number `rank`, counted by the barrier there.
  void store_remote(const Block& from, const void* to, const void* value, const void* barrier,
                    int rank, Place at) {
    if (rank < 0 || rank >= int(blocks_.size())) from.fail("no such block in the cluster", at);
    Block& there = *blocks_[rank];
    const size_t offset = from.offset(to);
    if (offset % 16 || int64_t(offset) + 16 > from.config.shared)
      from.fail("store outside of another block's shared memory", at);
    there.expect_store(offset, 16);
    char* const place = reinterpret_cast<char*>(there.shared.data()) + offset;
    stores_.push_back({&there, place, 16, {}, from.offset(barrier)});
    memcpy(stores_.back().value, value, 16);
  }

 private:
  struct Store {
    Block* block;  // null for global memory
    char* to;
    size_t size;
    char value[16];
    size_t barrier;
  };

  bool ended() const {
    for (const auto& block : blocks_)
      if (!block->all(Wait::done)) return false;
    return stores_.empty();
  }

  bool open_barrier() {
    for (const auto& block : blocks_)
      if (!block->all(Wait::team)) return false;
    for (const auto& block : blocks_) block->release();
    return true;
  }

  // Whether anything arrived; everything does with `all`.
  bool deliver(bool all) {
    std::vector<Store> left;
    std::vector<const char*> waiting;
    const size_t before = stores_.size();
    for (const Store& store : stores_) {
      const bool older = std::count(waiting.begin(), waiting.end(), store.to);
      if (!older && (all || !shuffled_ || random_() % 2)) {
        arrive(store);
      } else {
        left.push_back(store);
        waiting.push_back(store.to);
      }
    }
    stores_.swap(left);
    return stores_.size() < before;
  }

  void arrive(const Store& store) {
    if (store.block && store.block->all(Wait::done))
      throw std::runtime_error("a store into the shared memory of a block that has ended");
    memcpy(store.to, store.value, store.size);
    if (!store.block) return;
    const auto found = store.block->counters.find(store.barrier);
    if (found == store.block->counters.end())
      throw std::runtime_error("a store that is counted by a barrier not set up");
    Counter& counter = found->second;
    counter.bytes -= int64_t(store.size);
    counter.seen.push_back({store.block->offset(store.to), store.size});
    store.block->arrive(counter);
  }

  std::string whereabouts() const {
    std::string out;
    for (const auto& block : blocks_)
      if (!block->all(Wait::done)) out += (out.empty() ? "" : " ") + block->whereabouts();
    return out;
  }

  std::mt19937 random_;
  bool shuffled_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Store> stores_;
};

// Runs body() as every thread of every block, team after team.
template <class Body>
void launch(const Config& config, const Body& body) {
  std::vector<int> order;
  for (int i = 0; i < config.grid_x * config.grid_y; i += config.together) order.push_back(i);
  std::mt19937 random(config.seed);
  if (config.seed) std::shuffle(order.begin(), order.end(), random);
  for (int first : order) Team(config, first, random).run(body);
}

}  // namespace simt
