"""Times the cache cases of cases.py by every kernel that serves them."""

FAMILY = "cache"


def test_cache(case, kernel, bench, request):
    bench.run(case, kernel, request)
