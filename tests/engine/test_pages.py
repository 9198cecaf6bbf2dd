from __future__ import annotations

import pytest

from attnkit.integrations.engine.pages import OutOfPages, PagePool


def test_take_and_release():
    pool = PagePool(4, 16)
    pages = pool.take(3)
    assert sorted(pages) == pages == [0, 1, 2] and pool.available == 1
    with pytest.raises(OutOfPages, match="wanted 2 pages, 1 of 4 are free"):
        pool.take(2)
    assert pool.available == 1
    pool.release(pages)
    assert pool.available == 4


def test_release_twice_is_an_error_not_an_underflow():
    pool = PagePool(2, 16)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(RuntimeError, match="page 0 was given back more often"):
        pool.release(pages)
    assert pool.available == 2


def test_pages_for_counts_up():
    pool = PagePool(1, 16)
    assert [pool.pages_for(n) for n in (0, 1, 15, 16, 17)] == [0, 1, 1, 1, 2]


def test_a_prefix_is_found_and_shared_and_leaves_one_token():
    pool = PagePool(8, 4, prefix_cache=True)
    tokens = list(range(12))
    pages, entries = pool.take(3), []
    pool.remember(pages, entries, tokens, 12)
    assert pool.find(tokens) == (pages[:2], entries[:2])  # the third page's last token must still be computed
    found, _ = pool.find([*tokens, 99])
    assert found == pages
    assert pool.find([*tokens[:8], 7, 7, 7, 7, 7])[0] == pages[:2]
    assert pool.find([5, *tokens])[0] == []
    for held in (pages, pages[:2], found, pages[:2]):
        pool.release(held)
    assert pool.available == 8
    assert pool.find([*tokens, 99])[0] == pages  # remembered though nobody uses them
    assert pool.available == 5


def test_what_is_remembered_goes_when_the_page_is_needed_and_not_before():
    pool = PagePool(3, 2, prefix_cache=True)
    pages, entries = pool.take(2), []
    pool.remember(pages, entries, [1, 2, 3, 4], 4)
    pool.release(pages)
    assert pool.take(1) == [2]  # the page that holds nothing goes first
    assert pool.find([1, 2, 3, 4, 5])[0] == pages
    pool.release(pages)
    assert pool.take(1) == [pages[1]]  # then the end of the prefix
    found, _ = pool.find([1, 2, 3, 4, 5])
    assert found == [pages[0]]
    pool.release(found)
    pool.take(1)
    assert pool.find([1, 2, 3, 4, 5]) == ([], [])


def test_equal_pages_after_different_prefixes_are_different():
    pool = PagePool(8, 2, prefix_cache=True)
    first, entries = pool.take(2), []
    pool.remember(first, entries, [1, 1, 7, 7], 4)
    assert pool.find([2, 2, 7, 7, 0])[0] == []
    assert pool.find([7, 7, 0])[0] == []


def test_without_the_prefix_cache_nothing_is_found():
    pool = PagePool(4, 2)
    entries: list[int] = []
    pool.remember(pool.take(2), entries, [1, 2, 3, 4], 4)
    assert entries == [] and pool.find([1, 2, 3, 4, 5]) == ([], [])
