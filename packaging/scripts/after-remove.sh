# After the files are gone for good.
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
