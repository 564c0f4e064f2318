// The split of missing experts against brute force over all subsets, and the costs that it learns from a simulated
// machine.
#include "check.h"
#include "cpu/balancer.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

namespace {

constexpr uint64_t expert_bytes = 3 << 20;

// A machine whose every cost is known.
struct Machine {
    double cpu_byte, pair_byte, link_byte, contention;

    double cpu_ns(size_t experts, size_t pairs) const {
        const auto bytes = static_cast<double>(expert_bytes);
        return experts == 0 ? 0
                            : 15e3 + bytes * (static_cast<double>(experts) * cpu_byte +
                                              static_cast<double>(pairs - experts) * pair_byte);
    }
    double link_ns(size_t experts) const {
        return experts == 0 ? 0 : 8e3 + static_cast<double>(experts) * static_cast<double>(expert_bytes) * link_byte;
    }
    double cpu_shared_ns(size_t experts, size_t pairs, size_t fetched) const {
        const double alone = cpu_ns(experts, pairs);
        return alone + contention * std::min(alone, link_ns(fetched));
    }
    double block_ns(size_t experts, size_t pairs, size_t fetched, const edge::Around & around = {}) const {
        const double link = fetched > 0 ? around.link + link_ns(fetched) : 0;
        const double alone = cpu_ns(experts, pairs);
        return std::max(alone + contention * std::min(alone, link), link + around.device);
    }
};

std::vector<edge::Miss> random_misses(std::mt19937 & random, int most) {
    std::vector<edge::Miss> misses(1 + random() % static_cast<unsigned>(most));
    for (size_t i = 0; i < misses.size(); ++i) {
        misses[i] = { static_cast<int32_t>(i), 1 + static_cast<int32_t>(random() % 5),
                      static_cast<float>(random() % 100) / 100 };
    }
    return misses;
}

size_t pairs_of(const std::vector<edge::Miss> & misses, size_t from) {
    size_t pairs = 0;
    for (size_t i = from; i < misses.size(); ++i) {
        pairs += static_cast<size_t>(misses[i].pairs);
    }
    return pairs;
}

double best_of_all_subsets(const Machine & machine, const std::vector<edge::Miss> & misses,
                           const edge::Around & around = {}) {
    double least = HUGE_VAL;
    for (unsigned subset = 0; subset < (1U << misses.size()); ++subset) {
        size_t fetched = 0, pairs = 0;
        for (size_t i = 0; i < misses.size(); ++i) {
            const bool fetch = ((subset >> i) & 1U) != 0;
            fetched += fetch ? 1 : 0;
            pairs += fetch ? 0 : static_cast<size_t>(misses[i].pairs);
        }
        least = std::min(least, machine.block_ns(misses.size() - fetched, pairs, fetched, around));
    }
    return least;
}

// Run the balancer on the machine; return the ratio of its splits' time to the best possible one over the last blocks.
double run(const Machine & machine, edge::Balancer & balancer, int blocks, int counted) {
    std::mt19937 random(7);
    std::normal_distribution<double> noise(1.0, 0.03);
    double taken = 0, best = 0;
    for (int block = 0; block < blocks; ++block) {
        std::vector<edge::Miss> misses = random_misses(random, 8);
        const size_t fetched = balancer.split(misses, expert_bytes);
        const size_t computed = misses.size() - fetched, pairs = pairs_of(misses, fetched);
        const double cpu = machine.cpu_shared_ns(computed, pairs, fetched) * std::max(0.8, noise(random));
        const double link = machine.link_ns(fetched) * std::max(0.8, noise(random));
        if (computed > 0) {
            balancer.computed(computed, pairs, expert_bytes, cpu, balancer.link_ns(fetched, expert_bytes));
        }
        if (fetched > 0) {
            balancer.fetched(fetched, expert_bytes, std::max(cpu, link), link > cpu);
        }
        if (block >= blocks - counted) {
            taken += machine.block_ns(computed, pairs, fetched);
            best += best_of_all_subsets(machine, misses);
        }
    }
    return taken / best;
}

const Machine machines[] = {
    { 1.0 / 15, 0.5 / 15, 1.0 / 12.5, 0.2 }, // a laptop: six cores, PCIe 4 x8
    { 1.0 / 38, 0.3 / 38, 1.0 / 45, 0.5 }, // a server
    { 1.0 / 5, 1.0 / 5, 1.0 / 25, 0.0 }, // a slow CPU: everything is fetched
    { 1.0 / 60, 0.1 / 60, 1.0 / 4, 1.0 }, // a slow link: almost nothing is fetched
};

void splits_are_exact_for_the_costs_it_knows() {
    std::mt19937 random(3);
    for (int i = 0; i < 3000; ++i) {
        edge::Balancer balancer(12'500'000'000, true);
        std::vector<edge::Miss> warm = random_misses(random, 3);
        for (int block = 0; block < 20; ++block) { // measuring blocks
            balancer.split(warm, expert_bytes);
        }
        std::vector<edge::Miss> misses = random_misses(random, 9);
        edge::Around around;
        around.link = random() % 2 ? static_cast<double>(random() % 400'000) : 0;
        around.device = random() % 2 ? static_cast<double>(random() % 400'000) : 0;
        const size_t fetched = balancer.split(misses, expert_bytes, around);
        const Machine known{ 1 / (balancer.cpu_bytes_per_s() / 1e9), 0.5 / 15, 1 / (balancer.link_bytes_per_s() / 1e9),
                             balancer.contention() };
        const double taken = known.block_ns(misses.size() - fetched, pairs_of(misses, fetched), fetched, around);
        CHECK(taken <= best_of_all_subsets(known, misses, around) * (1 + 1e-9));
    }
}

// While the device reads the block's experts the CPU has time for one more.
void the_devices_time_is_the_cpus() {
    edge::Balancer balancer(12'500'000'000, true);
    const auto ns_of = [](double bytes_per_s) { return 1e9 * static_cast<double>(expert_bytes) / bytes_per_s; };
    // A laptop's VRAM
    balancer.calibrate({ expert_bytes, 15e3 + ns_of(12.5e9), ns_of(12.5e9), 15e3 + ns_of(12.5e9), 1, 0, 1e9 / 250e9 });
    std::vector<edge::Miss> misses{ { 0, 1, 0.0F }, { 1, 1, 0.0F }, { 2, 1, 0.0F }, { 3, 1, 0.0F }, { 4, 1, 0.0F } };
    edge::Around around;
    CHECK(balancer.split(misses, expert_bytes, around) == 3); // of five that take equally long on either side
    around.device = balancer.device_ns(32, expert_bytes); // 0.4 ms, an expert 0.25 ms
    CHECK(balancer.split(misses, expert_bytes, around) == 2);
    CHECK(std::abs(balancer.device_bytes_per_s() - 250e9) < 1 && balancer.contention() == 0);
}

void what_was_measured_is_believed_and_followed() {
    const Machine machine{ 1.0 / 40, 0.5 / 40, 1.0 / 20, 0.3 };
    edge::Balancer balancer(0, true);
    balancer.calibrate({ expert_bytes, machine.cpu_ns(1, 1), machine.cpu_ns(1, 2) - machine.cpu_ns(1, 1),
                         machine.cpu_shared_ns(1, 1, 1), 1, machine.link_ns(1), 0 });
    std::mt19937 random(11);
    for (int i = 0; i < 500; ++i) { // from the first block on
        std::vector<edge::Miss> misses = random_misses(random, 8);
        const size_t fetched = balancer.split(misses, expert_bytes);
        CHECK(machine.block_ns(misses.size() - fetched, pairs_of(misses, fetched), fetched) <=
              best_of_all_subsets(machine, misses) * (1 + 1e-9));
    }
    edge::Balancer changed(0, true);
    changed.calibrate(
        { expert_bytes, 3 * machine.cpu_ns(1, 1), 0, machine.cpu_ns(1, 1), 2, 2 * machine.link_ns(1), 0 });
    CHECK(run(machine, changed, 4000, 1500) < 1.05);
}

void learned_costs_come_within_a_twentieth_of_the_best() {
    for (const Machine & machine : machines) {
        edge::Balancer balancer(0, true);
        const double ratio = run(machine, balancer, 4000, 1500); // none of these is a measuring block
        CHECK(ratio < 1.05);
    }
}

void a_machine_that_changes_is_learned_again() {
    edge::Balancer balancer(0, true);
    run(machines[0], balancer, 2000, 1000);
    CHECK(run({ 2.0 / 15, 1.0 / 15, 2.0 / 12.5, 0.2 }, balancer, 2000, 500) < 1.1); // thermally throttled
}

// One block that took three times too long must not keep CPU and link apart for ever.
void a_hiccup_is_forgotten() {
    const Machine machine{ 1.0 / 25, 0.5 / 25, 1.0 / 25, 0.2 };
    edge::Balancer balancer(0, true);
    double taken = 0, best = 0;
    bool hiccup = false;
    for (int block = 0; block < 12000; ++block) {
        std::vector<edge::Miss> misses{ { 0, 1, 0.0F }, { 1, 1, 0.0F } };
        const size_t fetched = balancer.split(misses, expert_bytes);
        double cpu = machine.cpu_shared_ns(2 - fetched, 2 - fetched, fetched);
        if (fetched == 1 && !hiccup) {
            cpu *= 3;
            hiccup = true;
        }
        if (fetched < 2) {
            balancer.computed(2 - fetched, 2 - fetched, expert_bytes, cpu, balancer.link_ns(fetched, expert_bytes));
        }
        if (fetched > 0) {
            balancer.fetched(fetched, expert_bytes, std::max(cpu, machine.link_ns(fetched)),
                             machine.link_ns(fetched) > cpu);
        }
        if (block >= 8200 && block % 2048 >= 20) {
            taken += machine.block_ns(2 - fetched, 2 - fetched, fetched);
            best += best_of_all_subsets(machine, misses);
        }
    }
    CHECK(hiccup && taken < 1.01 * best);
}

// Two tokens for every missing expert: the cost of the weights shows only together with that of a further token. Waking
// threads are fifty times as slow at first; a machine that was busy all that time is measured again.
void what_was_slow_while_threads_woke_up_is_not_believed() {
    constexpr double usual = 1e5; // nanoseconds per expert
    edge::Balancer balancer(12'500'000'000, true);
    for (int block = 0; block < 8; ++block) {
        balancer.computed(1, 1, expert_bytes, block < 6 ? 50 * usual : usual, 0.0);
    }
    CHECK(std::abs(balancer.cpu_ns(1, 1, expert_bytes) - usual) < 0.01 * usual);

    edge::Balancer busy(12'500'000'000, true);
    std::vector<edge::Miss> misses;
    const auto split = [&] {
        misses = { { 4, 1, 0.1F }, { 9, 1, 0.9F }, { 2, 1, 0.5F }, { 7, 1, 0.3F } };
        return busy.split(misses, expert_bytes);
    };
    for (int block = 0; block < 200; ++block) {
        if (split() == 0) {
            busy.computed(4, 4, expert_bytes, 200 * usual, 0.0);
        }
    }
    CHECK(split() == 4 && busy.gain_ns() < usual / 100); // so nothing is computed that would correct the estimate
    busy.learn_cpu_again();
    CHECK(split() == 0);
    busy.computed(4, 4, expert_bytes, 4 * usual, 0.0);
    CHECK(std::abs(busy.cpu_ns(1, 1, expert_bytes) - usual) < 0.2 * usual);
}

void several_tokens_teach_the_cpu_too() {
    const Machine machine{ 1.0 / 60, 0.2 / 60, 1.0 / 20, 0.1 };
    edge::Balancer balancer(0, true);
    double taken = 0, best = 0;
    for (int block = 0; block < 6000; ++block) {
        std::vector<edge::Miss> misses{ { 0, 2, 0.0F }, { 1, 2, 0.0F }, { 2, 2, 0.0F }, { 3, 2, 0.0F } };
        const size_t fetched = balancer.split(misses, expert_bytes), left = 4 - fetched;
        const double cpu = machine.cpu_shared_ns(left, 2 * left, fetched);
        if (left > 0) {
            balancer.computed(left, 2 * left, expert_bytes, cpu, balancer.link_ns(fetched, expert_bytes));
        }
        if (fetched > 0) {
            balancer.fetched(fetched, expert_bytes, std::max(cpu, machine.link_ns(fetched)),
                             machine.link_ns(fetched) > cpu);
        }
        if (block >= 4200) {
            taken += machine.block_ns(left, 2 * left, fetched);
            best += best_of_all_subsets(machine, misses);
        }
    }
    CHECK(taken < 1.05 * best);
}

void costs_stay_finite() {
    edge::Balancer balancer(0, true);
    for (int i = 0; i < 5000; ++i) {
        balancer.computed(1, 1, expert_bytes, 10.0, 0.0);
        balancer.computed(1, 3, expert_bytes, 10.0, 0.0);
        balancer.fetched(1, expert_bytes, 1.0, true);
    }
    CHECK(std::isfinite(balancer.cpu_bytes_per_s()) && std::isfinite(balancer.link_bytes_per_s()));
}

void among_equals_the_highest_score_is_fetched() {
    edge::Balancer balancer(12'500'000'000, true);
    std::vector<edge::Miss> misses;
    for (int block = 0; block <= 20; ++block) {
        misses = { { 4, 1, 0.1F }, { 9, 1, 0.9F }, { 2, 1, 0.5F }, { 7, 1, 0.3F } };
        const size_t fetched = balancer.split(misses, expert_bytes);
        if (block < 12) {
            CHECK(fetched == 0);
        } else if (block < 16) {
            CHECK(fetched == 4);
        } else { // split to measure contention, then by cost
            CHECK(fetched == 2);
        }
    }
    CHECK(misses[0].expert == 9 && misses[1].expert == 2);
}

void without_overlap_nothing_is_fetched() {
    edge::Balancer balancer(0, false);
    std::vector<edge::Miss> misses{ { 0, 3, 1.0F }, { 1, 1, 0.0F } };
    for (int block = 0; block < 40; ++block) {
        CHECK(balancer.split(misses, expert_bytes) == 0);
    }
}

} // namespace

int main() {
    splits_are_exact_for_the_costs_it_knows();
    the_devices_time_is_the_cpus();
    what_was_measured_is_believed_and_followed();
    learned_costs_come_within_a_twentieth_of_the_best();
    a_machine_that_changes_is_learned_again();
    a_hiccup_is_forgotten();
    what_was_slow_while_threads_woke_up_is_not_believed();
    several_tokens_teach_the_cpu_too();
    costs_stay_finite();
    among_equals_the_highest_score_is_fetched();
    without_overlap_nothing_is_fetched();
    std::puts("balancer: ok");
}
