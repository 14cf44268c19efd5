"""Training: one loop for three stages, which differ in model, loss, frozen parts and preview."""
