"""Times the cases of sample_from_hidden in cases.py by every kernel that serves them."""

FAMILY = "hidden"


def test_hidden(case, kernel, bench, request):
    bench.run(case, kernel, request)
