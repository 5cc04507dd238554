"""What results are compared with: plain models, counts by hand, and tables that were measured."""
