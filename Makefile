# Every target sets up what it needs. `make demo` runs the main job on a real model, `make test` the tests.
ENVIRONMENT := .venv/.ready
RUN := .venv/bin/
LIBRARY := serve/kernels/cpu/libhalve_cpu.so

# Some images forbid Python to keep its bytecode, and then every process of the tests compiles torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check format clean

demo: $(ENVIRONMENT) $(LIBRARY)
	$(RUN)python -m benchmarks.demo

# Files of tests go to one process for each core; what measures times comes last, alone.
test: $(ENVIRONMENT) $(LIBRARY)
	$(RUN)python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile -m "not slow and not gpu and not alone"
	$(RUN)python -m pytest -m "alone and not slow and not gpu"

check: $(ENVIRONMENT) $(LIBRARY)
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)pyright
	$(RUN)python -m benchmarks.readme --check

format: $(ENVIRONMENT)
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

clean:
	rm -rf .venv build dist runs $(LIBRARY)

$(ENVIRONMENT): pyproject.toml deploy/constraints.txt deploy/environment.sh
	sh deploy/environment.sh
	touch $@

# Where there is no compiler, this says so and halve works without its kernels.
$(LIBRARY): serve/kernels/cpu/build.py $(wildcard serve/kernels/cpu/src/*) | $(ENVIRONMENT)
	$(RUN)python $< --if-possible
