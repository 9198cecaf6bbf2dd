"""Times the prefill cases of cases.py by every kernel that serves them."""

FAMILY = "prefill"


def test_prefill(case, kernel, bench, request):
    bench.run(case, kernel, request)
