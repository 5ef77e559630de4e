"""Who computes with how many threads."""

from concurrent.futures import ThreadPoolExecutor

import torch

from nlray.process.threads import compute_here_with, compute_with_one


def test_the_thread_that_works_has_all_threads_and_others_before_and_after_it_one():
    def fresh() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    def work() -> tuple[int, int, int]:
        compute_here_with(3)
        before = torch.get_num_threads()
        return before, fresh(), torch.get_num_threads()

    def make() -> tuple[int, tuple[int, int, int], int]:
        compute_with_one()
        with ThreadPoolExecutor(1) as pool:
            worked = pool.submit(work).result()
        return torch.get_num_threads(), worked, fresh()

    number = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(make).result() == (1, (3, 1, 3), 1)
    finally:
        torch.set_num_threads(number)
