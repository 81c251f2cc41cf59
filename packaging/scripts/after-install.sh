# After the files are in place. $previous: the version that was replaced, empty if there was none.
systemd-sysusers litefs.conf
systemd-tmpfiles --create litefs.conf
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    if [ -n "$previous" ]; then
        # Running agents are replaced; their mounts stay. What mounts for them keeps nothing.
        systemctl try-restart litefs-mount.service || true
        systemctl try-restart 'litefs@*.service' || true
    fi
fi
