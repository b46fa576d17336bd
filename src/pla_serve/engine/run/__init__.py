"""Running a batch: the model runner, executors, captured shapes, compiled layers."""
