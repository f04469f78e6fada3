"""The steps and trainings of each library, on the same problem."""
