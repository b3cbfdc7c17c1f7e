# Every target sets up what it needs. `make demo` runs the main job on a real model, `make test` the tests.
ENVIRONMENT := .venv/.ready
RUN := .venv/bin/

.PHONY: demo test check format clean

demo: $(ENVIRONMENT)
	$(RUN)python -m benchmarks.demo

test: $(ENVIRONMENT)
	$(RUN)python -m pytest

check: $(ENVIRONMENT)
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)pyright
	$(RUN)python -m benchmarks.readme --check

format: $(ENVIRONMENT)
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

clean:
	rm -rf .venv build dist runs

$(ENVIRONMENT): pyproject.toml deploy/constraints.txt deploy/environment.sh
	sh deploy/environment.sh
	touch $@
