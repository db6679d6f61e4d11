"""Networks of your own: `teacher.factory` and `student.factory` name a file in this folder and a function in it, FILE.py:FUNCTION.

The function takes no arguments and returns the module and its feature width; for a teacher also mean, std and image size, see example.py.
Editing a file here reruns the stages that depend on its network.
"""
