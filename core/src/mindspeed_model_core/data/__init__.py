"""Reading training data: documents, packing, and loaders whose order depends on no layout and resumes exactly."""
