"""Times the gemm cases of cases.py by every kernel that serves them."""

FAMILY = "gemm"


def test_gemm(case, kernel, bench, request):
    bench.run(case, kernel, request)
