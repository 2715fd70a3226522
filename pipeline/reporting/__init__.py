"""What people see: TensorBoard, figures, the report, and the tables in the terminal."""
