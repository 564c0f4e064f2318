"""edge-speq bench: policies against each other at equal bytes on the compute device, with llama-bench's habits.

matrix   which tests                    policies  which model each policy is, and who is in memory
prompts  the texts that are read        measure   one repetition of one test
compare  whether the texts agree        bound     what a clairvoyant cache would need
runner   the rounds                     rows, output  what is printed
"""
