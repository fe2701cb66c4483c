"""Evolution strategies: teach a controller to balance CartPole, with actors that share one array.

After Salimans et al., "Evolution strategies as a scalable alternative to reinforcement
learning" (2017).  Each generation tries the current weights plus and minus random
directions, and moves them toward the directions that scored well.  The directions are
slices of one table of noise that is `put` once: all actors read the same memory, and what
travels is the index of a slice instead of the slice.

CartPole-v1 counts as solved when the mean score of 100 episodes is at least 475 of 500.
"""

import argparse
import itertools
import time

import gymnasium
import numpy as np

import minray

SOLVED, EPISODES_TO_JUDGE = 475, 100
WEIGHTS = 5  # One for each of the four observations, and a constant.

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--actors", type=int, default=2)
parser.add_argument("--directions", type=int, default=16, help="tried in a generation, each both ways")
parser.add_argument("--generations", type=int, default=60, help="give up after so many")
parser.add_argument("--noise-megabytes", type=int, default=20)
parser.add_argument("--seed", type=int, default=1)


@minray.remote
class Player:
    def __init__(self, noise):
        self.noise = noise  # The table itself, read-only: not a copy.
        self.game = gymnasium.make("CartPole-v1")

    def play(self, weights, seed):
        """The score of one episode: for how many steps the pole stayed up."""
        observation, _ = self.game.reset(seed=seed)
        score, over = 0.0, False
        while not over:
            action = int(weights[:4] @ observation + weights[4] > 0)
            observation, reward, fallen, out_of_time, _ = self.game.step(action)
            score, over = score + reward, fallen or out_of_time
        return score

    def compare(self, weights, sigma, index, seed):
        """The scores of weights + noise and of weights - noise, in the same episode."""
        step = sigma * self.noise[index : index + WEIGHTS]
        return self.play(weights + step, seed), self.play(weights - step, seed)

    def judge(self, weights, seeds):
        return [self.play(weights, seed) for seed in seeds]


def main(options, sigma=0.5, rate=0.5):
    random = np.random.default_rng(options.seed)
    noise = random.standard_normal(options.noise_megabytes * 1_000_000 // 8)
    shared_noise = minray.put(noise)
    players = [Player.remote(shared_noise) for _ in range(options.actors)]
    weights = np.zeros(WEIGHTS)
    started, episodes = time.perf_counter(), 0

    for generation in range(1, options.generations + 1):
        indexes = random.integers(len(noise) - WEIGHTS, size=options.directions)
        seeds = random.integers(1 << 30, size=options.directions).tolist()
        calls = zip(itertools.cycle(players), indexes.tolist(), seeds)
        scores = minray.get([player.compare.remote(weights, sigma, *call) for player, *call in calls])
        episodes += 2 * len(scores)

        # Only the order of the scores counts, so that one lucky episode does not drag the weights along.
        ranks = np.argsort(np.argsort(np.ravel(scores))).reshape(-1, 2) / (2 * len(scores) - 1) - 0.5
        directions = np.stack([noise[index : index + WEIGHTS] for index in indexes])
        weights = weights + rate * (ranks[:, 0] - ranks[:, 1]) @ directions / sigma / len(scores)
        mean = np.mean(scores)
        print(f"  generation {generation:2}: mean score {mean:5.1f}")

        if mean > 0.8 * SOLVED:
            shares = np.array_split(np.arange(EPISODES_TO_JUDGE), options.actors)
            parts = [player.judge.remote(weights, share.tolist()) for player, share in zip(players, shares)]
            mean = np.mean(np.concatenate(minray.get(parts)))
            if mean >= SOLVED:
                elapsed = time.perf_counter() - started
                print(f"solved after {generation} generations, {episodes:,} episodes, {elapsed:.1f} s:")
                print(f"mean score {mean:.1f} over {EPISODES_TO_JUDGE} new episodes")
                return
    print(f"not solved after {options.generations} generations")


if __name__ == "__main__":
    options = parser.parse_args()
    with minray.init():
        main(options)
