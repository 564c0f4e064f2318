"""edge-speq bench: compare policies with equal bytes on the compute device, with llama-bench's tests and formats.

- matrix: the tests
- arms: the combinations of policy and options, and the models that are loaded for them
- measure, instrumented: one repetition of one test, and a model that times its steps
- compare: comparison of the generated texts
- clairvoyant_bound: upper bound of the speed
- runner: the rounds of repetitions
- rows, output: the results in llama-bench's formats
- recorder: records the routing of steps, for traces
"""
