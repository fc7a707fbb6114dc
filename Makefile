# Every target works without make too: scripts/train, scripts/test, scripts/test-all, scripts/check.
.PHONY: train test test-all check
train test test-all:
	@scripts/$@
check:
	@scripts/setup dev && scripts/check
