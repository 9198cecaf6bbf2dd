"""Times the decode cases of cases.py by every kernel that serves them."""

FAMILY = "decode"


def test_decode(case, kernel, bench, request):
    bench.run(case, kernel, request)
