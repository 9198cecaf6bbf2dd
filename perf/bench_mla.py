"""Times the mla cases of cases.py by every kernel that serves them."""

FAMILY = "mla"


def test_mla(case, kernel, bench, request):
    bench.run(case, kernel, request)
