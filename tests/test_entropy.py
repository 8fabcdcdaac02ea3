"""Ids are made of bytes that nobody else was given."""

import os
import threading

from starlette_aigateway.entropy import OF_AN_ID, POOL, Pool


def test_bytes_are_given_once_over_refills_and_threads() -> None:
    pool = Pool(os.urandom)
    taken: list[bytes] = []

    def take() -> None:
        taken.extend(pool(OF_AN_ID) for _ in range(10 * POOL))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {len(one) for one in taken} == {OF_AN_ID}
    assert len(set(taken)) == len(taken) == 4 * 10 * POOL


def test_more_than_a_pool_is_given_at_once() -> None:
    assert len(Pool(os.urandom)(POOL + 1)) == POOL + 1


def test_a_forked_child_gives_other_bytes_than_its_parent() -> None:
    pool = Pool(os.urandom)
    pool(OF_AN_ID)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, pool(OF_AN_ID))
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    theirs = os.read(reading, OF_AN_ID)
    os.close(reading)
    assert len(theirs) == OF_AN_ID
    assert theirs != pool(OF_AN_ID)
