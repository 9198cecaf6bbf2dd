"""Times the sampling cases of cases.py by every kernel that serves them."""

FAMILY = "sampling"


def test_sampling(case, kernel, bench, request):
    bench.run(case, kernel, request)
