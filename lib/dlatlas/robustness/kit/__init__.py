"""What the robustness chapters share: attacks with one signature, and accuracy under the strongest of several."""
