"""Ids are made of bytes that nobody else was given."""

import os
import threading

from starlette_aigateway.entropy import POOL, Pool


def test_bytes_are_given_once_over_refills_and_threads() -> None:
    pool = Pool(os.urandom)
    taken: list[bytes] = []

    def take() -> None:
        taken.extend(pool(10) for _ in range(POOL))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {len(one) for one in taken} == {10}
    assert len(set(taken)) == len(taken) == 4 * POOL


def test_more_than_a_pool_is_given_at_once() -> None:
    assert len(Pool(os.urandom)(POOL + 1)) == POOL + 1


def test_a_forked_child_gives_other_bytes_than_its_parent() -> None:
    pool = Pool(os.urandom)
    pool(10)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, pool(10))
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    theirs = os.read(reading, 10)
    os.close(reading)
    assert len(theirs) == 10
    assert theirs != pool(10)
